"""The search for the configuration to run."""
