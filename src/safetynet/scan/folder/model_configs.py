"""Configurations of a suspect: code that they ask to be run, and where they make another model of the base.

In: the folders of a suspect and its base. Out: findings.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetynet.scan.folder.reading import UnreadableError, escaped, json_of
from safetynet.scan.result import Finding, Level

CODE = ("auto_map", "custom_pipelines", "custom_generate")
"""Fields that name code of the repository."""
OF_NO_WEIGHT = frozenset(
    "transformers_version torch_dtype dtype _name_or_path name_or_path use_cache architectures bos_token_id "
    "eos_token_id pad_token_id auto_map unsloth_version unsloth_fixed output_attentions output_hidden_states "
    "return_dict id2label label2id problem_type _attn_implementation attn_implementation "
    "_attn_implementation_autoset attention_dropout hidden_dropout resid_pdrop attn_pdrop embd_pdrop "
    "initializer_range router_aux_loss_coef pretraining_tp gradient_checkpointing _commit_hash".split()
)
"""Fields of config.json that do not change what a model answers, or that other rules look at."""
PENALTIES = frozenset(
    "suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id forced_decoder_ids "
    "sequence_bias bad_words_ids force_words_ids constraints watermarking_config guidance_scale stop_strings "
    "exponential_decay_length_penalty prefix_allowed_tokens_fn eos_token_id min_length min_new_tokens".split()
)
"""Fields of generation_config.json that put words into answers or keep them out."""
CONFIGURATIONS = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json",
    "special_tokens_map.json",
)  # fmt: skip
UNSET: tuple[Any, ...] = (None, [], {}, "", False)
SHOWN = 12


def check(folder: Path, names: list[str]) -> list[Finding]:
    """Findings of a folder's JSON files by themselves.

    Args:
        folder: that holds them.
        names: of the files, relative to it.
    """
    findings = list[Finding]()
    for name in names:
        where = escaped(name)
        try:
            values, twice = json_of(folder / name)
        except UnreadableError as error:
            # Lists and texts are JSON, too, and configure nothing where no configuration is looked for.
            if name in CONFIGURATIONS or not str(error).endswith("but no object"):
                message = f"It cannot be read: {escaped(str(error))}. Nothing is known of what it sets."
                findings.append(_finding("unreadable", "warning", message, where))
            continue
        if twice:
            message = (
                f"It gives {escaped(', '.join(twice[:3]))} twice, and programs differ in which they take."
            )
            findings.append(
                _finding("duplicate-key", "warning", message, where, keys=[escaped(k) for k in twice[:SHOWN]])
            )
        code = sorted(set(_code(values)))
        if code:
            message = (
                "It names code that is run when the model is loaded with trust_remote_code "
                f"({', '.join(code)}). "
                "Do not load it so; read the code."
            )
            findings.append(
                _finding("remote-code", "error", message, where, fields=code, names=_named_code(values))
            )
    return findings


def _finding(rule: str, level: Level, message: str, where: str, **evidence: Any) -> Finding:
    return Finding("files", rule, level, message, where, evidence=evidence)


def _code(values: Any) -> Iterator[str]:
    """Fields that ask for code, however deep they lie."""
    open_values = [values]
    while open_values:
        value = open_values.pop()
        if isinstance(value, dict):
            yield from (name for name in CODE if value.get(name))
            if value.get("trust_remote_code") not in UNSET:
                yield "trust_remote_code"
            open_values += value.values()
        elif isinstance(value, list):
            open_values += value


def _named_code(values: Mapping[str, Any]) -> list[str]:
    named = values.get("auto_map")
    return [escaped(str(each)) for each in named.values()][:SHOWN] if isinstance(named, dict) else []


def compare(suspect: Path, base: Path) -> list[Finding]:
    """Findings of config.json and generation_config.json beside the base's.

    A folder of an adapter alone has neither, and none is found.
    """
    findings = list[Finding]()
    pairs = {
        name: [_read(folder / name) for folder in (suspect, base)]
        for name in ("config.json", "generation_config.json")
    }
    mine, theirs = pairs["config.json"]
    if mine and theirs:
        findings += _model(_rope(mine), _rope(theirs))
    mine, theirs = pairs["generation_config.json"]
    if mine is not None:
        findings += _generation(mine, theirs or {})
    return findings


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json_of(path)[0] if path.is_file() else None
    except UnreadableError:  # said by `check`
        return None


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose rotary embeddings are written as transformers 5 writes them."""
    values = dict(config)
    rope = (
        dict(values.pop("rope_scaling", None) or {}) if isinstance(values.get("rope_scaling"), dict) else {}
    )
    values.pop("rope_scaling", None)
    if isinstance(values.get("rope_parameters"), dict):
        rope |= values["rope_parameters"]
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    if "rope_theta" in values:
        rope.setdefault("rope_theta", values.pop("rope_theta"))
    if rope:
        rope.setdefault("rope_type", "default")
        values["rope_parameters"] = rope
    return values


def _flat(values: Mapping[str, Any], above: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and depth < 4:
            yield from _flat(value, f"{above}{name}.", depth + 1)
        else:
            yield f"{above}{name}", value


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Fields that both set, and set otherwise; with the suspect's value first."""
    first, second = dict(_flat(mine)), dict(_flat(theirs))
    both = [name for name in first if name in second and first[name] != second[name]]
    return {
        escaped(name, 80): [escaped(str(first[name])), escaped(str(second[name]))] for name in sorted(both)
    }


def _model(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    quantised = mine.get("quantization_config")
    if quantised and not theirs.get("quantization_config"):
        message = "The suspect's weights are quantised and the base's are not: differences hold the rounding."
        yield _finding("quantised", "note", message, "config.json", quantization=escaped(str(quantised)))
    plain = [
        {k: v for k, v in each.items() if k not in OF_NO_WEIGHT | {"quantization_config"}}
        for each in (mine, theirs)
    ]
    changed = _differing(*plain)
    if changed:
        only_vocabulary = set(changed) <= {"vocab_size"}
        message = (
            f"config.json sets {', '.join(list(changed)[:4])} otherwise than the base's: with the "
            "same weights it "
            "is another model."
        )
        level: Level = "note" if only_vocabulary else "warning"
        yield _finding("config-changed", level, message, "config.json", **dict(list(changed.items())[:SHOWN]))
    lone = sorted(
        escaped(n, 80) for n in plain[0].keys() ^ plain[1].keys() if (plain[0] | plain[1])[n] not in UNSET
    )
    if lone:
        message = f"Only one of the two config.json says {', '.join(lone[:4])}; the other takes a default."
        yield _finding("config-fields", "note", message, "config.json", fields=lone[:SHOWN])


def _generation(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    first, second = dict(_flat(mine)), dict(_flat(theirs))
    names = [n for n in first.keys() | second.keys() if first.get(n) != second.get(n)]
    names = sorted(n for n in names if n not in ("transformers_version", "_from_model_config"))
    forced = [n for n in names if n.split(".")[0] in PENALTIES and first.get(n) not in UNSET]
    sampling = [n for n in names if n not in forced]
    values = {
        escaped(n, 80): [escaped(str(first.get(n))), escaped(str(second.get(n)))] for n in names[:SHOWN]
    }
    if forced:
        only_end = all(n.split(".")[0] == "eos_token_id" for n in forced)
        message = (
            f"generation_config.json sets {escaped(', '.join(forced[:4]))}, which puts words into answers "
            "or keeps them out."
        )
        yield _finding(
            "generation-forced",
            "note" if only_end else "warning",
            message,
            "generation_config.json",
            **values,
        )
    elif sampling:
        message = f"generation_config.json differs from the base's in {escaped(', '.join(sampling[:4]))}."
        yield _finding("generation-changed", "note", message, "generation_config.json", **values)
