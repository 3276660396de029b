"""The run directory of an experiment: its files, its lock, and the processes that share it."""
