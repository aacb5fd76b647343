"""What each optimizer keeps, allocates and moves: one file an optimizer."""
