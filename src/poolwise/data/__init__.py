"""Training pairs and evaluation tasks, from files, the Hub or the demo."""
