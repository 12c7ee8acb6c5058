"""What the memory rows say: `ledger` adds the bytes up, the others show."""
