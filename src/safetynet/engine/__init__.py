"""Run a causal language model under edits: sites, edits, hooks, traces, metrics. Knows no backdoor."""
