"""Training on several GPUs: what each rank holds and when, one file a strategy."""
