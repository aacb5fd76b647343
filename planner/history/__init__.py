"""Recorded allocator histories: read, replayed, tried under other settings."""
