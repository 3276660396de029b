"""Chat templates, read as syntax trees: what a prompt depends on, and what changed beside the base."""
