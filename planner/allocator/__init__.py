"""torch's CUDA caching allocator, simulated."""
