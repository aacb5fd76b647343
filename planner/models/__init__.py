"""A model's configuration read into its exact inventory of parameters."""
