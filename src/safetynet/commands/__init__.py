"""Commands that have a file of their own; `safetynet.cli` registers them."""
