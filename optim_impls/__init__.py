"""The optimizers themselves (torch and triton)."""
