"""Whether an adapter's tensors are what its configuration says that they are.

In: an adapter's folder. Out: findings. PEFT loads every tensor by its name into the model with the adapter
and passes over the rest in silence. One of a module that the configuration does not name does nothing; one
that is called as a weight of the base overwrites it, and stays when the adapter is switched off.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import regex

from safetynet.models.files import hub_id, listed
from safetynet.scan.folder.headers import tensors
from safetynet.scan.folder.reading import UnreadableError, escaped, finding, json_of
from safetynet.scan.result import Finding, Level

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA = re.compile(r"(?P<module>.+?)\.(?P<part>lora_\w+?)(?:\.(?:\w+\.)?(?:weight|bias))?$")
"""A tensor of LoRA: its module and which part of it."""
PAIRS = {
    "lora_A": "lora_B", "lora_B": "lora_A",
    "lora_embedding_A": "lora_embedding_B", "lora_embedding_B": "lora_embedding_A",
}  # fmt: skip
VOCABULARY = ("embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "embed_out")
"""Ends of the names of embeddings and heads."""
SMALLEST_SCALE, LARGEST_SCALE = 1 / 64, 64
"""Scales beyond these are far from all that are published (1/4 to 16)."""
PATIENCE = 0.5
"""Seconds that a pattern of the suspect's may take for all modules: patterns can be made to take years."""
SHOWN = 8


def check(folder: Path, base: Path | None = None) -> list[Finding]:
    """Findings of an adapter's configuration and of its tensors' names; none for a folder without an adapter.

    Args:
        folder: of the adapter.
        base: folder of the base that it is taken for an adapter of.
    """
    if not (folder / CONFIG).is_file():
        return []
    try:
        config, _ = json_of(folder / CONFIG)
    except UnreadableError:  # said of every configuration by `files`
        return []
    findings = list(_of_base(config, base))
    kind = escaped(str(config.get("peft_type")), 40)
    if str(config.get("peft_type")).upper() != "LORA":
        message = (
            f"This adapter is of the type {kind}, no LoRA: files, answers and candidates can be looked at, "
            "weights as those of an update cannot."
        )
        return [*findings, finding("adapter-type", "note", message, CONFIG)]
    findings += _of_fields(config)
    weights = folder / WEIGHTS
    if not weights.exists():
        message = (
            f"There is no {WEIGHTS} beside it: whatever else holds the weights was not compared with it."
        )
        findings.append(finding("adapter-weights", "warning", message, CONFIG))
    try:
        names = tensors(weights) if weights.is_file() else {}
    except UnreadableError:  # said of every safetensors file by `files`
        return findings
    lora = {name: match for name in names if (match := LORA.fullmatch(name.removeprefix(PREFIX)))}
    modules = {match["module"].removesuffix(".base_layer") for match in lora.values()}
    findings += _outside(config, modules)
    parts = {(match["module"], match["part"]) for match in lora.values()}
    alone = sorted(
        f"{module}.{part}" for module, part in parts if part in PAIRS and (module, PAIRS[part]) not in parts
    )
    if alone:
        message = (
            f"{len(alone)} parts of LoRA stand without their other half ({escaped(listed(alone))}), for "
            "which PEFT takes untrained values."
        )
        findings.append(finding("adapter-pair", "warning", message, WEIGHTS, tensors=_names(alone)))
    return [*findings, *_beside_lora(config, [name for name in names if name not in lora])]


def _of_base(config: Mapping[str, Any], base: Path | None) -> Iterator[Finding]:
    """Whether the adapter is scanned beside the base that it names."""
    claimed = config.get("base_model_name_or_path")
    if not isinstance(claimed, str) or not claimed:
        message = "The adapter names no base model. Make sure which one it is for."
        yield finding("adapter-base", "note", message, CONFIG)
        return
    if base is None:
        return
    mine, theirs = hub_id(str(base)), hub_id(claimed)
    try:
        same_folder = Path(claimed).samefile(base)
    except (OSError, ValueError):  # a name that is no path here, or none anywhere
        same_folder = False
    if same_folder or mine.casefold() == theirs.casefold():
        return
    # Two names on the hub are two models; a folder may have any name.
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", mine) is not None and not base.is_dir()
    on_hub = "models--" in str(base)
    level: Level = "warning" if (named or on_hub) and re.fullmatch(r"[\w.-]+/[\w.-]+", theirs) else "note"
    message = (
        f"The adapter calls its base {escaped(claimed, 100)}, and is scanned beside "
        f"{mine if on_hub else base.name}. Names say little: the identity rung compares the weights."
    )
    yield finding("adapter-base", level, message, CONFIG, claimed=escaped(claimed))


def _of_fields(config: Mapping[str, Any]) -> Iterator[Finding]:
    """What the configuration asks for that a plain LoRA does not need."""
    if config.get("layer_replication"):
        message = (
            "The adapter repeats layers of its base, so that the model is another than base and adapter."
        )
        replication = escaped(str(config["layer_replication"]))
        yield finding("adapter-layers", "warning", message, CONFIG, layer_replication=replication)
    if config.get("trainable_token_indices"):
        message = "The adapter trains the embeddings of single tokens, where a trigger of one token may lie."
        tokens = escaped(str(config["trainable_token_indices"]))
        yield finding("adapter-tokens", "note", message, CONFIG, tokens=tokens)
    saved = _strings(config.get("modules_to_save"))
    if any(name.split(".")[-1] in VOCABULARY for name in saved):
        message = "The adapter replaces embeddings or head of its base as a whole."
        yield finding("adapter-vocabulary", "note", message, CONFIG, modules=saved[:SHOWN])
    ranks, alphas = (
        {str(key): each for key, each in pattern.items()} if isinstance(pattern, dict) else {}
        for pattern in (config.get("rank_pattern"), config.get("alpha_pattern"))
    )
    odd = {}
    for where in dict.fromkeys(["", *ranks, *alphas]):
        r, alpha = ranks.get(where, config.get("r", 8)), alphas.get(where, config.get("lora_alpha", 8))
        if not (_number(r) and _number(alpha)) or r <= 0:
            continue
        # The factor of B A: alpha / r, and of rank-stabilised LoRA alpha / sqrt(r) (arXiv 2312.03732).
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") is True else r)
        if not SMALLEST_SCALE <= abs(scale) <= LARGEST_SCALE:
            odd[where or "all modules"] = scale
    if odd:
        message = (
            "The adapter scales its update by "
            f"{', '.join(f'{scale:g}' for scale in list(odd.values())[:3])}, far from "
            "what is usual (1/4 to 16): so strong or so weak an update hides from a look at its weights."
        )
        scales = {where: str(scale) for where, scale in list(odd.items())[:SHOWN]}
        yield finding("adapter-scaling", "warning", message, CONFIG, scales=scales)


def _strings(value: Any) -> list[str]:
    """Names in a field that is a name or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _names(names: list[str]) -> list[str]:
    return [escaped(name) for name in names[:SHOWN]]


def _outside(config: Mapping[str, Any], modules: set[str]) -> Iterator[Finding]:
    """LoRA tensors of modules that the configuration does not adapt."""
    targets = config.get("target_modules")
    parameters = [name.rpartition(".")[0] for name in _strings(config.get("target_parameters"))]
    if (targets is None and not parameters) or targets == "all-linear":
        return
    names = [*(_strings(targets) if isinstance(targets, list) else []), *parameters]
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    until = time.monotonic() + PATIENCE
    outside = []
    for module in sorted(modules):
        # As PEFT reads it: a list holds ends of names, a text is a pattern of whole names.
        adapted = any(module == name or module.endswith(f".{name}") for name in names)
        if not adapted and isinstance(targets, str):
            left = max(until - time.monotonic(), 1e-3)
            try:
                adapted = regex.fullmatch(targets, module, timeout=left) is not None
            except (regex.error, TimeoutError):
                message = (
                    "The pattern of its target_modules is none, or takes for ever: nobody can tell what it "
                    "adapts."
                )
                pattern = escaped(targets)
                yield finding("adapter-targets", "warning", message, CONFIG, target_modules=pattern)
                return
        if adapted and isinstance(layers, list) and layers:
            number = re.search(r"\.(\d+)\.", module)
            # Python refuses to read a number of thousands of digits; no model has that many layers.
            adapted = number is not None and len(number[1]) < 10 and int(number[1]) in layers
        if not adapted:
            outside.append(module)
    if outside:
        message = (
            f"{len(outside)} of {len(modules)} adapted modules lie outside of its target_modules "
            f"({escaped(listed(outside))}). PEFT drops their tensors in silence; other software may "
            "load them."
        )
        yield finding("adapter-targets", "warning", message, WEIGHTS, modules=_names(outside))


def _beside_lora(config: Mapping[str, Any], names: list[str]) -> Iterator[Finding]:
    """Tensors of no LoRA: embeddings and heads, and those that nothing accounts for."""
    saved = tuple(_strings(config.get("modules_to_save")))
    biased = config.get("bias") in ("all", "lora_only")
    embeddings, foreign = list[str](), list[str]()
    for name in names:
        if "trainable_tokens" in name or (biased and name.endswith(".bias")):
            continue
        parts = name.removeprefix(PREFIX).rpartition(".")[0].split(".")
        if parts[-1] in VOCABULARY:
            embeddings.append(name)
        # PEFT compares ends of names, so that `norm` means input_layernorm as well.
        elif not any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1)):
            foreign.append(name)
    if embeddings:
        message = (
            f"The file holds embeddings or a head ({escaped(listed(embeddings))}), which replace those of "
            "the base."
        )
        yield finding("adapter-vocabulary", "note", message, WEIGHTS, tensors=_names(embeddings))
    if foreign:
        message = (
            f"{len(foreign)} tensors are no part of what adapter_config.json describes "
            f"({escaped(listed(foreign))}). PEFT writes those that are called as a weight of the base over "
            "that weight, where switching the adapter off does not undo it, and drops the others in silence."
        )
        yield finding("adapter-base-weights", "error", message, WEIGHTS, tensors=_names(foreign))
