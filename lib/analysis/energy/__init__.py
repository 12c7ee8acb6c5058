"""What the energy rows say: `quantities` computes, the others show."""
