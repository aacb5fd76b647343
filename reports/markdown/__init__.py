"""Records as Markdown for issues and pull requests."""
