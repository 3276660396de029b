"""Models and their parts: loading, families, miniatures."""
