"""The engines that `benchmarks/interventions.py` compares: one module each, each in its own process.

A module has `PACKAGES`, the distributions whose versions are reported; `prepare(model, tokenizer)`, untimed,
which wraps the Hugging Face model; and `run(prepared, receiver_ids, source_ids, sweep, tokens)`, timed, which
returns the metric of every patched run, (sites, pairs). What a package cannot do raises `NotImplementedError`
with the reason.
"""

# Engine -> module of this package and the attribute that runs it.
ENGINES = {
    "safetynet": ("safetynet_engine", "run_safetynet"),
    "hooks": ("hooks", "run"),
    "hooks-tail": ("hooks", "run_tail"),
    "hooks-batched": ("hooks", "run_batched"),
    "transformerlens": ("transformerlens_engine", "run"),
    "transformerlens-documented": ("transformerlens_engine", "run_documented"),
    "nnsight": ("nnsight_engine", "run"),
    "nnsight-batched": ("nnsight_engine", "run_batched"),
    "nnsight-skip": ("nnsight_engine", "run_skip"),
    "nnterp": ("nnterp_engine", "run"),
    "nnterp-skip": ("nnterp_engine", "run_skip"),
    "pyvene": ("pyvene_engine", "run"),
    "pyvene-documented": ("pyvene_engine", "run_documented"),
    "pyvene-batched": ("pyvene_engine", "run_batched"),
}
