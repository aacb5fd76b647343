"""Models to train with their inputs: of the catalogue, or of the user."""
