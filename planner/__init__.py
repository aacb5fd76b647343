"""Memory models of optimizers and training steps, in pure Python."""
