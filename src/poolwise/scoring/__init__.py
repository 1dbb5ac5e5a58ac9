"""From a model and tasks to rows of the long table."""
