"""Facts as data files: GPUs, models, optimizers and published figures."""
