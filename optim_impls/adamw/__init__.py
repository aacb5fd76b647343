"""AdamW: decoupled weight decay, with optional stochastic or Kahan rounding of bf16 parameters."""
