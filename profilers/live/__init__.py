"""A real training step measured as it runs."""
