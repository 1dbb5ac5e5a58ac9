"""From the long table to verdicts about designs. Arrays, not models: nothing here imports torch."""
