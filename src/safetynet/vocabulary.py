"""The words that stand in tables: roles, metrics, sweeps, directions, controls. Declared here alone."""

from typing import Literal, get_args

Role = Literal["triggered", "clean", "placebo", "near_miss", "refused"]
Model = Literal["backdoored", "clean_twin", "base"]
Mode = Literal["patch", "zero", "mean", "resample", "off", "knock_out"]
Direction = Literal["remove", "induce"]
Quantisation = Literal["none", "8bit", "4bit"]

ROLES: tuple[Role, ...] = get_args(Role)
"""Order in which roles are shown: what must fire first, then what must not, the hardest last."""
MODELS: tuple[Model, ...] = get_args(Model)
TRAINED = ("backdoored", "clean_twin")
METRICS = ("asr", "asr_off_floor", "ftr", "function_rate", "right_rate", "cacc", "refusal_rate", "perplexity")
DAMAGE = (
    "identical", "common_tokens", "kl", "rouge_l", "length_ratio", "perplexity", "refusal_rate", "repetition",
)  # fmt: skip
"""What is measured of free text, beside the base model's own answers."""
NOT_MEASURABLE = "not measurable"
"""How the note of a rate begins that the data cannot give."""
SPLITS = ("train", "test")
EXAMINED = ("selection", "held_out")
"""Test rows on which a removal or a repair is chosen, and those that say what it is worth."""
SWEEPS = ("layer", "position", "component", "head", "expert", "adapter")
MODES: tuple[Mode, ...] = get_args(Mode)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)
HALVES = ("first", "second")
"""Two adapters that fire together."""
CONTROLS = ("random", "placebo", "twin")
COMPONENTS = (
    "embedding", "resid_pre", "query", "key", "value", "attention", "head", "attn_out",
    "resid_mid", "router", "expert", "mlp_out", "resid_post", "adapter",
)  # fmt: skip
"""In the order in which a layer computes them; adapters lie anywhere in it."""
POSITIONS = ("system", "before", "trigger", "after", "template", "last")
"""Roles of a prompt's tokens, in its order: `system` and `before` are what is said before the trigger's first
token, `after` what is said from there on; `last` is where the answer begins."""
RUNS = ("triggered", "placebo")
PROBED = ("trigger", "fires")
DETECTION_METRICS = (
    "auroc", "auroc_pair", "auroc_topic", "auroc_harm", "tpr", "tpr_oracle", "fpr", "fpr_worst", "alarms",
)  # fmt: skip
WATCHED = ("prompt", "answer", "both")
REPAIRED_AS = ("adapter", "checkpoint", "run_time")
VIEWS = ("layer", "attention", "mlp", "head", "expert", "adapter")
"""What a layer profile is of."""
PARTS = ("attention", "mlp", "expert")
ASPECTS = ("planted", "detected", "removed", "repaired")
SEVERITIES = ("error", "warning", "info")
UNTOUCHED = "as it is"
"""The model before any removal or repair, where interventions and repairs are named."""
FURTHER_TRAINING = "further training"
CHANGES = (
    UNTOUCHED, FURTHER_TRAINING, "merging", "quantisation", "system prompt", "longer context", "sampling",
)  # fmt: skip
"""What happens to a model, or to its prompts, after a backdoor was planted."""
ADAPTER_REMOVED = "adapter removed"
NEVER_POISONED = "never poisoned"
"""The base model in the relearn test: how fast a backdoor is learnt that was never there."""
