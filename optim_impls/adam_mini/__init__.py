"""Adam-mini: one second moment a block of parameters, the blocks taken from the model's structure."""
