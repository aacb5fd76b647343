"""Tracing: a training step on tensors without contents, allocation by allocation."""
