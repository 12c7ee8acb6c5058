"""What the batch rows say: `points` reads them, the others show."""
