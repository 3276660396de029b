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
from safetynet.scan.folder.reading import UnreadableError, escaped, json_of
from safetynet.scan.folder.safetensors_header import Tensor, tensors
from safetynet.scan.result import Finding, Level

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA = re.compile(r"(?P<module>.+?)\.(?P<part>lora_\w+?)(?:\.(?:\w+\.)?(?:weight|bias))?$")
"""A tensor of LoRA: its module and which part of it."""
PAIRS = {
    "lora_A": "lora_B",
    "lora_B": "lora_A",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}
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
    if str(config.get("peft_type")).upper() != "LORA":
        findings.append(
            _finding(
                "adapter-type",
                "note",
                f"This adapter is of the type {escaped(str(config.get('peft_type')), 40)}, no LoRA: "
                "files, answers and "
                "candidates can be looked at, weights as those of an update cannot.",
            )
        )
        return findings
    findings += _of_fields(config)
    if not (folder / WEIGHTS).exists():
        message = (
            f"There is no {WEIGHTS} beside it: whatever else holds the weights was not compared with it."
        )
        findings.append(_finding("adapter-weights", "warning", message))
    try:
        names = tensors(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
    except UnreadableError:  # said of every safetensors file by `files`
        return findings
    return [*findings, *_of_tensors(config, names)]


def _finding(rule: str, level: Level, message: str, where: str = CONFIG, **evidence: Any) -> Finding:
    return Finding("files", rule, level, message, where, evidence=evidence)


def _of_base(config: Mapping[str, Any], base: Path | None) -> Iterator[Finding]:
    claimed = config.get("base_model_name_or_path")
    if not isinstance(claimed, str) or not claimed:
        yield _finding(
            "adapter-base", "note", "The adapter names no base model. Make sure which one it is for."
        )
        return
    if base is None:
        return
    mine, theirs = hub_id(str(base)), hub_id(claimed)
    if mine.casefold() == theirs.casefold() or _same_folder(claimed, base):
        return
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", mine) is not None and not base.is_dir()
    on_hub = "models--" in str(base)
    level: Level = "warning" if (named or on_hub) and re.fullmatch(r"[\w.-]+/[\w.-]+", theirs) else "note"
    yield _finding(
        "adapter-base",
        level,
        f"The adapter calls its base {escaped(claimed, 100)}, and is scanned beside "
        f"{mine if on_hub else base.name}. "
        "Names say little: the identity rung compares the weights.",
        claimed=escaped(claimed),
    )


def _same_folder(name: str, base: Path) -> bool:
    try:
        return Path(name).samefile(base)
    except (OSError, ValueError):
        return False


def _of_fields(config: Mapping[str, Any]) -> Iterator[Finding]:
    if config.get("layer_replication"):
        message = (
            "The adapter repeats layers of its base, so that the model is another than base and adapter."
        )
        yield _finding(
            "adapter-layers", "warning", message, layer_replication=escaped(str(config["layer_replication"]))
        )
    if config.get("trainable_token_indices"):
        message = "The adapter trains the embeddings of single tokens, where a trigger of one token may lie."
        yield _finding(
            "adapter-tokens", "note", message, tokens=escaped(str(config["trainable_token_indices"]))
        )
    saved = _strings(config.get("modules_to_save"))
    if any(name.split(".")[-1] in VOCABULARY for name in saved):
        message = "The adapter replaces embeddings or head of its base as a whole."
        yield _finding("adapter-vocabulary", "note", message, modules=saved[:SHOWN])
    odd = {
        where: scale for where, scale in _scales(config) if not SMALLEST_SCALE <= abs(scale) <= LARGEST_SCALE
    }
    if odd:
        message = (
            "The adapter scales its update by "
            f"{', '.join(f'{scale:g}' for scale in list(odd.values())[:3])}, far from "
            "what is usual (1/4 to 16): so strong or so weak an update hides from a look at its weights."
        )
        yield _finding(
            "adapter-scaling", "warning", message, scales={k: str(v) for k, v in list(odd.items())[:SHOWN]}
        )


def _strings(value: Any) -> list[str]:
    """Names in a field that is a name or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str)]


def _scales(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """By which factor each kind of module is scaled, where it can be told."""
    ranks, alphas = (_pattern(config.get(name)) for name in ("rank_pattern", "alpha_pattern"))
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    for where in dict.fromkeys(["", *ranks, *alphas]):
        r, a = ranks.get(where, rank), alphas.get(where, alpha)
        if not (_number(r) and _number(a)) or r <= 0:
            continue
        yield where or "all modules", a / (math.sqrt(r) if config.get("use_rslora") is True else r)


def _pattern(value: Any) -> dict[str, Any]:
    return {str(key): each for key, each in value.items()} if isinstance(value, dict) else {}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _of_tensors(config: Mapping[str, Any], names: Mapping[str, Tensor]) -> Iterator[Finding]:
    lora = {name: match for name in names if (match := LORA.fullmatch(name.removeprefix(PREFIX)))}
    yield from _outside(config, {match["module"].removesuffix(".base_layer") for match in lora.values()})
    parts = {(match["module"], match["part"]) for match in lora.values()}
    alone = sorted(
        f"{module}.{part}" for module, part in parts if part in PAIRS and (module, PAIRS[part]) not in parts
    )
    if alone:
        message = (
            f"{len(alone)} parts of LoRA stand without their other half ({escaped(listed(alone))}), for "
            "which PEFT "
            "takes untrained values."
        )
        yield _finding("adapter-pair", "warning", message, WEIGHTS, tensors=_names(alone))
    rest = [name for name in names if name not in lora]
    embeddings, foreign = _rest(config, rest)
    if embeddings:
        message = (
            f"The file holds embeddings or a head ({escaped(listed(embeddings))}), which replace those of "
            "the base."
        )
        yield _finding("adapter-vocabulary", "note", message, WEIGHTS, tensors=_names(embeddings))
    if foreign:
        message = (
            f"{len(foreign)} tensors are no part of what adapter_config.json describes "
            f"({escaped(listed(foreign))}). "
            "PEFT writes those that are called as a weight of the base over that weight, where "
            "switching the adapter "
            "off does not undo it, and drops the others in silence."
        )
        yield _finding("adapter-base-weights", "error", message, WEIGHTS, tensors=_names(foreign))


def _names(names: list[str]) -> list[str]:
    return [escaped(name) for name in names[:SHOWN]]


def _outside(config: Mapping[str, Any], modules: set[str]) -> Iterator[Finding]:
    """LoRA tensors of modules that the configuration does not adapt."""
    targets = config.get("target_modules")
    parameters = [name.rpartition(".")[0] for name in _strings(config.get("target_parameters"))]
    if (targets is None and not parameters) or targets == "all-linear":
        return
    saved = _strings(targets) if isinstance(targets, list) else []
    patterns = [targets] if isinstance(targets, str) else []
    until = time.monotonic() + PATIENCE
    try:
        outside = [
            module
            for module in sorted(modules)
            if not (_ends(module, [*saved, *parameters]) or _matches(patterns, module, until))
            or _other_layer(config, module)
        ]
    except (regex.error, TimeoutError):
        message = (
            "The pattern of its target_modules is none, or takes for ever: nobody can tell what it adapts."
        )
        yield _finding("adapter-targets", "warning", message, target_modules=escaped(str(targets)))
        return
    if outside:
        message = (
            f"{len(outside)} of {len(modules)} adapted modules lie outside of its target_modules "
            f"({escaped(listed(outside))}). PEFT drops their tensors in silence; other software may "
            "load them."
        )
        yield _finding("adapter-targets", "warning", message, WEIGHTS, modules=_names(outside))


def _ends(module: str, names: list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _matches(patterns: list[str], module: str, until: float) -> bool:
    left = max(until - time.monotonic(), 1e-3)
    return any(regex.fullmatch(pattern, module, timeout=left) is not None for pattern in patterns)


def _other_layer(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module lies in a layer that the configuration leaves out."""
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    number = re.search(r"\.(\d+)\.", module)
    return isinstance(layers, list) and bool(layers) and (number is None or int(number[1]) not in layers)


def _rest(config: Mapping[str, Any], names: list[str]) -> tuple[list[str], list[str]]:
    """Tensors of no LoRA: embeddings and heads, and those that nothing accounts for."""
    saved = _strings(config.get("modules_to_save"))
    biased = config.get("bias") in ("all", "lora_only")
    embeddings, foreign = list[str](), list[str]()
    for name in names:
        module = name.removeprefix(PREFIX).rpartition(".")[0]
        parts = module.split(".")
        if "trainable_tokens" in name or (biased and name.endswith(".bias")):
            continue
        if parts[-1] in VOCABULARY:
            embeddings.append(name)
        # PEFT compares ends of names, so that `norm` means input_layernorm as well.
        elif not any(".".join(parts[:end]).endswith(tuple(saved)) for end in range(1, len(parts) + 1)):
            foreign.append(name)
    return embeddings, foreign
