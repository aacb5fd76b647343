"""Records rendered as text for a terminal of 60 columns or more."""
