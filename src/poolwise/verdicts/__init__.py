"""From the long table to findings about designs. No torch."""
