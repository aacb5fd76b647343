"""Traced and live training steps (torch)."""
