"""Where training pairs and evaluation folders come from, and the plan of batches."""
