"""Many training steps measured one after another, each in a process of its own."""
