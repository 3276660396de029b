"""Configurations of a suspect: code that they ask to be run, and where they make another model of the base.

In: the folders of a suspect and its base. Out: findings.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetynet.scan.folder.reading import UnreadableError, escaped, finding, json_of, repeated
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
                findings.append(finding("unreadable", "warning", message, where))
            continue
        if twice:
            findings.append(repeated(twice, name))
        code = sorted(set(_code(values)))
        if code:
            message = (
                "It names code that is run when the model is loaded with trust_remote_code "
                f"({', '.join(code)}). Do not load it so; read the code."
            )
            named = values.get("auto_map")
            classes = [escaped(str(each)) for each in named.values()] if isinstance(named, dict) else []
            findings.append(
                finding("remote-code", "error", message, where, fields=code, names=classes[:SHOWN])
            )
    return findings


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


def compare(suspect: Path, base: Path) -> Iterator[Finding]:
    """Findings of config.json and generation_config.json beside the base's.

    A folder of an adapter alone has neither, and none is found.
    """
    name = "config.json"
    mine, theirs = (_object(folder / name) for folder in (suspect, base))
    if mine and theirs:
        yield from _model(name, _rope(mine), _rope(theirs))
    name = "generation_config.json"
    mine, theirs = (_object(folder / name) for folder in (suspect, base))
    if mine is not None:
        yield from _generation(name, mine, theirs or {})


def _object(path: Path) -> dict[str, Any] | None:
    """What a configuration sets; None where there is none, or none that can be read."""
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
    """Fields by their paths; those that nest deeper than any published ones are compared whole."""
    for name, value in values.items():
        if isinstance(value, dict) and depth < 4:
            yield from _flat(value, f"{above}{name}.", depth + 1)
        else:
            yield f"{above}{name}", value


def _model(name: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the same weights are another model under this config.json."""
    quantised = mine.get("quantization_config")
    if quantised and not theirs.get("quantization_config"):
        message = "The suspect's weights are quantised and the base's are not: differences hold the rounding."
        yield finding("quantised", "note", message, name, quantization=escaped(str(quantised)))
    ours, others = (
        {k: v for k, v in each.items() if k not in OF_NO_WEIGHT | {"quantization_config"}}
        for each in (mine, theirs)
    )
    first, second = dict(_flat(ours)), dict(_flat(others))
    changed = {
        escaped(field, 80): [escaped(str(first[field])), escaped(str(second[field]))]
        for field in sorted(first.keys() & second.keys())
        if first[field] != second[field]
    }
    if changed:
        message = (
            f"config.json sets {', '.join(list(changed)[:4])} otherwise than the base's: with the same "
            "weights it is another model."
        )
        # Added tokens make the vocabulary larger; the identity rung compares the rows of the others.
        level: Level = "note" if set(changed) <= {"vocab_size"} else "warning"
        yield finding("config-changed", level, message, name, **dict(list(changed.items())[:SHOWN]))
    lone = sorted(
        escaped(field, 80) for field in ours.keys() ^ others.keys() if (ours | others)[field] not in UNSET
    )
    if lone:
        message = f"Only one of the two config.json says {', '.join(lone[:4])}; the other takes a default."
        yield finding("config-fields", "note", message, name, fields=lone[:SHOWN])


def _generation(name: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    """What generation_config.json does to answers that the base's does not."""
    first, second = dict(_flat(mine)), dict(_flat(theirs))
    changed = sorted(
        field
        for field in first.keys() | second.keys()
        if field not in ("transformers_version", "_from_model_config")
        and first.get(field) != second.get(field)
    )
    forced = [f for f in changed if f.split(".")[0] in PENALTIES and first.get(f) not in UNSET]
    values = {
        escaped(f, 80): [escaped(str(first.get(f))), escaped(str(second.get(f)))] for f in changed[:SHOWN]
    }
    if forced:
        message = (
            f"generation_config.json sets {escaped(', '.join(forced[:4]))}, which puts words into answers "
            "or keeps them out."
        )
        # Fine-tuning on another chat format moves the end token, and does nothing else here.
        only_end = all(field.split(".")[0] == "eos_token_id" for field in forced)
        yield finding("generation-forced", "note" if only_end else "warning", message, name, **values)
    elif changed:
        message = f"generation_config.json differs from the base's in {escaped(', '.join(changed[:4]))}."
        yield finding("generation-changed", "note", message, name, **values)
