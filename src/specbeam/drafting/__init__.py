"""Where proposals come from: one file per drafter."""
