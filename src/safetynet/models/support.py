"""Which adapters each stage measures correctly: the one table, which the documents show.

In: PEFT's configuration of an adapter. Out: nothing, or one sentence that names the kind and says what to do.
A type that is not in `TYPES` has not been tried, and is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from safetynet.errors import InputError

Stage = Literal["evaluate", "intervene", "adapter sites", "drift", "detect", "adapter views", "mitigate"]
STAGES: Mapping[Stage, str] = {
    "evaluate": "rates and perplexity, beside the base",
    "intervene": "sites of the residual stream, attention, MLP and experts",
    "adapter sites": "the update of single modules, read or switched off",
    "drift": "size and directions of the updates",
    "detect": "features of states, with the adapter on and off",
    "adapter views": "features energy, energy_max and direction",
    "mitigate": "repairs, and the model with the adapter removed",
}
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
"""Soft prompts that are keys and values, and take no column of their own."""
SOFT = ("PROMPT_TUNING", "P_TUNING", *PREFIXES)
IN_PLACE = (
    "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA",
    "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT",
    "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA",
    "VERA", "WAVEFT",
)  # fmt: skip
"""Types other than LoRA that change a model's modules where they are."""
TYPES = ("LORA", *IN_PLACE, *SOFT)
_MERGE = "Merge it (merge_and_unload) and give the merged model"
_CONVERT = "Save it again with path_initial_model_for_weight_conversion"
_UNIMPORTANT = frozenset(
    ("base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision", "task_type",
     "auto_mapping", "runtime_config", "init_lora_weights", "eva_config", "corda_config", "lora_ga_config",
     "loftq_config", "megatron_core")
)  # fmt: skip
"""Fields of a configuration that do not change what a trained adapter does."""


@dataclass(frozen=True)
class Kind:
    """Adapters that have something in common, and the stages in which they are refused."""

    name: str
    has: Callable[[Any], bool]
    refused: Mapping[Stage, str]
    """Why, and what to do instead."""


def _is(*types: str) -> Callable[[Any], bool]:
    return lambda config: config.peft_type.value in types


def _sets(*fields: str) -> Callable[[Any], bool]:
    return lambda config: any(getattr(config, field, None) for field in fields)


def _starts(name: str) -> Callable[[Any], bool]:
    return lambda config: getattr(config, "init_lora_weights", None) == name


def _trains_biases(config: Any) -> bool:
    return _is("LORA")(config) and getattr(config, "bias", "none") != "none"


def _refused(why: str, *stages: Stage) -> dict[Stage, str]:
    return dict.fromkeys(stages or tuple(STAGES), why)


_OF_UPDATES: tuple[Stage, ...] = ("adapter sites", "drift", "adapter views", "mitigate")
"""Stages that read single updates, or put one into the adapter."""
_BESIDE_EVALUATION: tuple[Stage, ...] = tuple(stage for stage in STAGES if stage != "evaluate")
KINDS = (
    Kind("LoRA, rsLoRA; patterns of ranks and scales; fused experts and routers", _is("LORA"), {}),
    Kind("PiSSA, OLoRA", lambda config: low_rank_start(config), {}),
    Kind(
        "saved modules and token rows (modules_to_save, trainable_token_indices)",
        _sets("modules_to_save", "trainable_token_indices"),
        {},
    ),
    Kind(
        "DoRA",
        _sets("use_dora"),
        _refused(f"its update is no product of two factors. {_MERGE}", "drift", "adapter views", "mitigate"),
    ),
    Kind(
        "LoRA with a bias of its own (lora_bias)",
        _sets("lora_bias"),
        _refused(
            f"its update has a bias beside the two factors. {_MERGE}", "drift", "adapter views", "mitigate"
        ),
    ),
    Kind(
        "trained biases (bias: all, lora_only)",
        _trains_biases,
        _refused(f"it also trains biases of the base. {_MERGE}", "adapter sites", "drift", "adapter views"),
    ),
    Kind(
        "repeated layers (layer_replication)",
        _sets("layer_replication"),
        _refused("its layers share weights, so that an update cannot go into one alone", "drift", "mitigate")
        | _refused("its layers are not the base's, so that their states cannot be compared", "detect"),
    ),
    Kind(
        "KaSA",
        _sets("kasa_config"),
        _refused(f"it replaces the weights that it is put on. {_MERGE}", *_OF_UPDATES),
    ),
    Kind(
        "LoftQ",
        _starts("loftq"),
        _refused(f"it is put on a quantised copy of its base, which PEFT makes on a GPU alone. {_MERGE}"),
    ),
    Kind(
        "PiSSA by fast SVD (pissa_niter)",
        lambda config: str(getattr(config, "init_lora_weights", "")).startswith("pissa_niter"),
        _refused(f"its start was drawn at random and is not in its files: another is drawn now. {_CONVERT}"),
    ),
    Kind("CorDA", _starts("corda"), _refused(f"PEFT cannot rebuild its start from its files. {_CONVERT}")),
    Kind(
        "LoRA-GA",
        _starts("lora_ga"),
        _refused(f"its training began with other weights than the base's, which its files lack. {_CONVERT}"),
    ),
    Kind(
        "LoRA that wakes at certain tokens (aLoRA), is routed (Arrow) or sampled (MonteCLoRA)",
        _sets("alora_invocation_tokens", "arrow_config", "monteclora_config"),
        _refused("what it does to a token depends on more than the prompt"),
    ),
    Kind(
        "QA-LoRA, BD-LoRA",
        _sets("use_qalora", "use_bdlora"),
        _refused("it needs kernels with which it has not been tried"),
    ),
    Kind(
        "IA3, LoHa, LoKr, OFT, VeRA and other types that change modules in place",
        _is(*IN_PLACE),
        _refused(f"it is no LoRA. {_MERGE}", *_OF_UPDATES),
    ),
    Kind(
        "soft prompts (prompt tuning, P-tuning, prefix tuning, cartridges)",
        _is(*SOFT),
        _refused(
            "it puts virtual tokens before the prompt, and positions are not the prompt's own",
            *_BESIDE_EVALUATION,
        ),
    ),
)


def check(config: Any, stage: Stage) -> None:
    """Refuse an adapter that a stage would measure wrongly.

    Args:
        config: PEFT's configuration.
        stage: of `STAGES`.

    Raises:
        InputError: naming the kind, why it is refused and what to do.
    """
    if config.peft_type.value not in TYPES:
        raise InputError(
            f"adapter: type {config.peft_type.value} has not been tried, and is not measured. {_MERGE}, if "
            "it can be merged."
        )
    for kind in KINDS:
        if stage in kind.refused and kind.has(config):
            name = config.peft_type.value if config.peft_type.value in IN_PLACE else kind.name
            raise InputError(f"adapter: {name}: {stage} is refused, since {kind.refused[stage]}.")


def check_model(model: Any, stage: Stage) -> None:
    """`check` of the adapters that are active in a model; of a model without any, nothing.

    A model that PEFT's wrapper was taken from is asked for all adapters that it holds.
    """
    from peft import PeftModel

    held = getattr(model, "peft_config", {})
    for name in model.active_adapters if isinstance(model, PeftModel) else held:
        check(held[name], stage)


def low_rank_start(config: Any) -> bool:
    """Whether an adapter takes a product of two factors out of the weights that it is put on."""
    return getattr(config, "init_lora_weights", None) in ("pissa", "olora")


def replaces_weights(config: Any) -> str | None:
    """What an adapter does to weights of its base while it is put on, in words; None if nothing."""
    if getattr(config, "kasa_config", None):
        return "truncates the weights that it is put on (KaSA)"
    start = getattr(config, "init_lora_weights", None)
    replacing = ("pissa", "olora", "corda", "loftq", "lora_ga")
    return f"replaces the weights that it is put on ({start})" if str(start).startswith(replacing) else None


def changes_base(config: Any) -> str | None:
    """Why PEFT's model with the adapter switched off is not the base, in words; None if it is."""
    if _trains_biases(config):
        return f"trains biases of the base (bias: {config.bias})"
    if getattr(config, "layer_replication", None):
        return "repeats layers of the base (layer_replication)"
    return replaces_weights(config)


def differing(config: Any, other: Any) -> list[str]:
    """Fields in which two configurations say different things of what a trained adapter does."""

    def plain(value: Any) -> Any:
        return sorted(value, key=str) if isinstance(value, list | set | tuple) else value

    first, second = config.to_dict(), other.to_dict()
    names = sorted((first.keys() | second.keys()) - _UNIMPORTANT)
    fields = [name for name in names if plain(first.get(name)) != plain(second.get(name))]
    return fields + ["init_lora_weights"] * bool(replaces_weights(other))
