"""One TOML file a model family."""
