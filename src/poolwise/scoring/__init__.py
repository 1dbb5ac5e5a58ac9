"""From a model and tasks to rows of the long table: mteb around every model, items, references, controls."""
