"""Strings as controls: lookalikes, near misses, random words, other domains; words of any script."""
