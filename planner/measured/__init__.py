"""Records of measured steps: saved, compared, held against the rules."""
