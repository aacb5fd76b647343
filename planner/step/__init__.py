"""The rules of one training step: the allocations that it makes, in order."""
