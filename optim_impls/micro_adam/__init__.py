"""MicroAdam: Adam without moments, from a window of selected gradients and a 4-bit error feedback."""
