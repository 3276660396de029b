"""Rung 2: tensor by tensor against the base. A copy is said to be one, and so is a merged LoRA.

In: a suspect beside its base. Out: what differs, by how much and of which rank. `recovery` makes a LoRA of a
difference of low rank.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from safetynet.errors import InputError
from safetynet.models import adapters, lora, support
from safetynet.models.blocks import unwrapped
from safetynet.models.files import counted, finite, listed
from safetynet.models.suspect import Suspect
from safetynet.scan.result import Finding, RungResult
from safetynet.scan.tensors import (
    LOW_RANK,
    STORED,
    Kind,
    Pair,
    Spectrum,
    pairs,
    same_bytes,
    spectrum_of,
    stored_as,
)

EXACT = 2**25
"""Entries of a tensor up to which it is compared in fp64: of larger ones the copies would be too large."""
SAME_MODEL = 0.5
"""Median cosine of weight matrices with the base's below which the base is another. Independent weights have
about 0, fine-tuning leaves it above 0.9."""
FEW_ROWS = 0.01
"""Share of the vocabulary: changing fewer rows than this looks like changing single tokens."""
SHOWN = 50
"""Changed tensors that a result lists."""
_UNIMPORTANT = frozenset(
    ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
     "model_type", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "vocab_size",
     "tie_word_embeddings")
)  # fmt: skip
"""Fields of a configuration that change no logit of the same tokens, or that tensors show."""


@dataclass(frozen=True)
class Change:
    """A tensor that differs from the base's."""

    tensor: str
    """By the base's own name."""
    kind: Kind
    relative: float
    """Frobenius norm of the change over the norm of the base's tensor; 1 where that is 0."""
    norm: float
    base_norm: float
    shape: tuple[int, ...] = ()
    rank: int | None = None
    """Singular values above what rounding alone can give, the largest of the experts'; None where there are
    `COMPONENTS` or more, of DoRA, and of what is no matrix."""
    energy: float | None = None
    """Share of the squared norm that these singular values hold; the rest is rounding."""
    rows: tuple[int, ...] | None = None
    """Of embeddings: ids of the tokens whose rows differ, where these are few."""


@dataclass(frozen=True)
class Identity:
    """What a suspect is, beside its base, by weights alone."""

    identical: bool
    """Every tensor is byte-identical and the configuration computes the same; of an adapter, every update is
    exactly zero."""
    changed: tuple[Change, ...]
    """The largest relative change first."""
    untouched: int
    """Parameters that are the base's, tied ones counted once."""
    rounded: Mapping[str, int] = field(default_factory=dict)
    """How many of the untouched ones are the base's in a coarser number type, by that type."""
    stored: str = ""
    """Coarsest type of a changed tensor, of which rounding is reckoned; "" for an adapter."""
    configuration: tuple[str, ...] = ()
    """Fields in which the configurations compute differently."""
    added_rows: int = 0
    """Rows of the vocabulary that the suspect has more than its base; below 0, fewer."""

    @property
    def relative(self) -> float:
        """Norm of all changes together over that of the changed tensors in the base."""
        change, base = (
            math.hypot(*(getattr(each, name) for each in self.changed)) for name in ("norm", "base_norm")
        )
        return 0.0 if change == 0 else change / base if base else 1.0

    @property
    def rank(self) -> int | None:
        """Of the LoRA that explains all changes; None where none does that is smaller than the changes."""
        ranks = [each.rank for each in self.changed if each.rank is not None]
        if len(ranks) < len(self.changed):
            return None
        # Entries of all B (out, r) and A (r, in) together: two factors explain a change only if they are
        # fewer than the entries that changed.
        factors = sum(
            each.rank * sum(each.shape[-2:]) * math.prod(each.shape[:-2])
            for each in self.changed
            if each.rank
        )
        return (
            max(ranks, default=0) if factors < sum(math.prod(each.shape) for each in self.changed) else None
        )

    @property
    def full(self) -> list[str]:
        """Changed matrices of which two factors would be no smaller."""
        return [
            each.tensor
            for each in self.changed
            if each.kind in LOW_RANK
            and (each.rank is None or each.rank * sum(each.shape[-2:]) >= math.prod(each.shape[-2:]))
        ]


@torch.no_grad()
def identity(suspect: Suspect) -> Identity:
    """Compare a suspect with its base, tensor by tensor.

    Costs one pass over the weights, and a singular value decomposition of each changed matrix.

    Raises:
        InputError: if weights are no finite numbers, if the base is another model (`wrong-base`), or if the
            adapter is no LoRA, so that it has no update of single tensors.
    """
    if not adapters.has_adapter(suspect.model):
        return compare_whole(suspect)[0]
    model = suspect.model
    if reason := no_update(model):
        raise InputError(f"{name_of(suspect)}: {reason}")
    name = model.active_adapter
    _check_finite(name_of(suspect), adapters.adapter_parameters(model))
    changes, head = [], _head_name(model)
    for tensor, module in lora.adapted_tensors(model, name):
        # Of e experts or one matrix: weight (e, out, in), singular values (e, r). What fp32 cannot tell from
        # 0 beside the largest, as `torch.linalg.matrix_rank` reckons it, is no rank.
        update, weight = lora.update_of(module, name), lora.base_weight(module)
        values = update.decomposed()[1]
        floor = values.amax(1, keepdim=True) * torch.finfo(torch.float32).eps * max(weight.shape[1:])
        rank, norm = int((values > floor).sum(1).max()), float(values.norm())
        if update.product().any():
            # DoRA's update has full rank, whatever B A has.
            low = name not in getattr(module, "lora_magnitude_vector", {})
            kind: Kind = "head" if tensor == head else kind_of_lora(module)
            change = _change(tensor, kind, norm, float(weight.norm()))
            sides = tuple(weight.shape if len(weight) > 1 else weight.shape[1:])
            changes.append(replace(change, shape=sides, rank=rank if low else None, energy=1.0))
        if update.bias is not None and update.bias.any():
            bias = getattr(module.get_base_layer(), "bias", None)
            size = 0.0 if bias is None else float(bias.detach().float().norm())
            changes.append(
                _change(tensor.removesuffix("weight") + "bias", "bias", float(update.bias.norm()), size)
            )
    changes += _replaced(model)
    repeated = bool(getattr(model.active_peft_config, "layer_replication", None))
    total = sum(1 for _ in adapters.base_parameters(model))
    touched = {change.tensor for change in changes}
    return Identity(
        identical=not changes and not repeated,
        changed=tuple(sorted(changes, key=lambda each: -each.relative)),
        untouched=total - len(touched),
        configuration=("num_hidden_layers",) if repeated else (),
    )


def measure(suspect: Suspect) -> RungResult:
    """Rung 2: relative size of all changes; 0 of a copy of the base.

    Raises:
        InputError: as `identity`, but for an adapter that is no LoRA: of that the rung is skipped.
    """
    start = time.perf_counter()
    if adapters.has_adapter(suspect.model) and (reason := no_update(suspect.model)):
        return RungResult("identity", skipped=reason, seconds=time.perf_counter() - start)
    result = identity(suspect)
    fields = asdict(result)
    # An adapter that is a copy of the base adds nothing to compare: it has no update.
    copy = None if adapters.has_adapter(suspect.model) else replace(suspect, model=suspect.base.model)
    return RungResult(
        "identity",
        score=result.relative,
        unit="relative change of the changed weights",
        control=0.0 if copy is None else identity(copy).relative,
        seconds=time.perf_counter() - start,
        details={
            **fields,
            "changed": fields["changed"][:SHOWN],
            "tensors_changed": len(result.changed),
            "kinds": dict(Counter(change.kind for change in result.changed)),
            "relative": result.relative,
            "rank": result.rank,
        },
        findings=tuple(_findings(suspect, result)),
    )


def is_copy(suspect: Suspect) -> bool:
    """Whether a whole model is its base bit by bit; costs one pass over the weights. Errors as `identity`."""
    rows = (model.get_input_embeddings().weight.shape for model in (suspect.model, suspect.base.model))
    configurations = (suspect.model.config, suspect.base.model.config)
    return (
        all(
            same_bytes(pair.suspect, pair.base)
            for pair in pairs(suspect.model, unwrapped(suspect.base.model))
        )
        and len(set(rows)) == 1
        and not _differing_fields(*configurations)
    )


def no_update(model: Any) -> str:
    """Why an adapter has no update of single weights that could be looked at; "" where it has."""
    config = model.active_peft_config
    kind = config.peft_type.value
    if kind == "LORA":
        return ""
    if kind in support.SOFT:
        return (
            f"{kind}: a soft prompt changes no weight of its base. What the model says and where it leaves "
            "its base can still be looked at."
        )
    return (
        f"{kind} is no LoRA: it has no low-rank update. Merge it (merge_and_unload) and give the merged "
        "model; as it is, what the model says and where it leaves its base can still be looked at."
    )


def kind_of_lora(module: Any) -> Kind:
    """What a LoRA module changes."""
    if hasattr(module, "parameter_name"):
        return "parameter"
    return "embeddings" if len(module.lora_embedding_A) else "linear"


def _replaced(model: Any) -> Iterator[Change]:
    """Tensors that an adapter has in place of the base's: biases, saved modules, token rows."""
    parameters, head = dict(model.named_parameters(remove_duplicate=False)), _head_name(model)
    seen = set()
    for name, counterpart in adapters.base_counterparts(model).items():
        if id(parameters[name]) in seen:  # of tied embeddings and head
            continue
        seen.add(id(parameters[name]))
        now, before = parameters[name].detach().float(), counterpart.float()
        if now.shape != before.shape:  # rows of added tokens
            size = min(len(now), len(before))
            now, before = now[:size], before[:size]
        if torch.equal(now, before):
            continue
        plain = name.removeprefix("base_model.model.").replace(f".modules_to_save.{model.active_adapter}", "")
        rows = (now - before).reshape(len(now), -1).abs().amax(1).nonzero()[:, 0].tolist()
        kind: Kind = "norm" if now.ndim == 1 else "linear"
        kind = "bias" if plain.endswith("bias") else kind
        few = None
        if ".token_adapter." in plain:
            plain, kind = plain.split(".token_adapter.")[0] + ".weight", "embeddings"
            layer = model.get_submodule(name.split(".trainable_tokens_delta.")[0])
            few = tuple(int(layer.token_indices[model.active_adapter][row]) for row in rows)
        elif "embed" in plain or plain == head:
            kind = "head" if plain == head else "embeddings"
            few = tuple(rows) if len(rows) <= FEW_ROWS * len(now) else None
        yield _change(plain, kind, float((now - before).norm()), float(before.norm()), few)


def compare_whole(suspect: Suspect, rank: int | None = 0) -> tuple[Identity, dict[str, Spectrum]]:
    """A whole model beside its base, and so many components of the changed matrices; None for their ranks."""
    name, base = name_of(suspect), unwrapped(suspect.base.model)
    if adapters.has_adapter(suspect.base.model) or list(lora.adapted_tensors(base)):
        raise InputError(
            "base: an adapter is attached to it. Take it off with safetynet.models.adapters.detach."
        )
    _check_finite(name, suspect.model.named_parameters())
    tensors = list(pairs(suspect.model, base))
    cosines = []
    for pair in tensors:
        if pair.kind in LOW_RANK:
            cosine = nn.functional.cosine_similarity(
                pair.suspect.float().flatten(), pair.base.float().flatten(), dim=0
            )
            cosines.append(float(cosine))
    if cosines and (middle := sorted(cosines)[len(cosines) // 2]) < SAME_MODEL:
        raise InputError(
            f"{name}: wrong-base: it was not made from {suspect.base.id}. The cosine of its "
            f"weight matrices with the base's is {middle:.2f} in the median; a fine-tuned model's is near 1. "
            "Name its own base with --base."
        )
    changes, spectra, rounded, untouched, identical, stored = [], {}, Counter[str](), 0, True, []
    for pair in tensors:
        counts = pair.kind != "buffer"  # of parameters alone it is said how many are the base's
        if same_bytes(pair.suspect, pair.base):
            untouched += counts
            continue
        identical = False
        type_ = stored_as(pair.suspect)
        # A copy that was stored coarser differs by its rounding alone.
        reference = pair.base.to(STORED[type_])
        if same_bytes(pair.suspect.to(STORED[type_]), reference):
            untouched += counts
            rounded[type_] += counts
            continue
        stored.append(type_)
        change, spectrum = _compared(pair, type_)
        changes.append(change)
        if spectrum is not None:
            spectra[pair.name] = spectrum.first((spectrum.rank or 0) if rank is None else rank)
    rows = (suspect.model.get_input_embeddings().weight.shape[0], base.get_input_embeddings().weight.shape[0])
    configuration = _differing_fields(suspect.model.config, base.config)
    result = Identity(
        identical=identical and not configuration and rows[0] == rows[1],
        changed=tuple(sorted(changes, key=lambda each: -each.relative)),
        untouched=untouched,
        rounded={name: count for name, count in rounded.items() if count},
        stored=min(stored, key=list(STORED).index, default=""),
        configuration=configuration,
        added_rows=rows[0] - rows[1],
    )
    return result, spectra


def _compared(pair: Pair, stored: str) -> tuple[Change, Spectrum | None]:
    """How a tensor differs from the base's.

    The base was rounded to the suspect's type before the update was added to it, or the sum was: which of the
    two leaves the update of lower rank is taken. The wrong one adds the base's own rounding to the
    difference.
    """
    number = torch.float64 if pair.base.numel() <= EXACT else torch.float32
    exact, before = pair.suspect.to(number), pair.base.to(number)
    rounded = pair.base.to(STORED[stored]).to(number)
    references = [rounded] if torch.equal(before, rounded) else [rounded, before]
    if pair.kind not in LOW_RANK:
        return _change(pair.name, pair.kind, float((exact - rounded).norm()), float(before.norm())), None
    eps = torch.finfo(STORED[stored]).eps
    spectra = [spectrum_of(exact - reference, exact, eps) for reference in references]
    spectrum = min(spectra, key=lambda each: (each.rank or math.inf, -each.energy))
    delta = exact - references[spectra.index(spectrum)]
    rows = None
    if pair.kind in ("embeddings", "head"):
        changed = (exact - rounded).abs().amax(1).nonzero()[:, 0]
        rows = tuple(changed.tolist()) if len(changed) <= FEW_ROWS * len(delta) else None
    change = _change(pair.name, pair.kind, float(delta.norm()), float(before.norm()), rows)
    return replace(change, shape=tuple(delta.shape), rank=spectrum.rank, energy=spectrum.energy), spectrum


def _change(tensor: str, kind: Kind, norm: float, size: float, rows: tuple[int, ...] | None = None) -> Change:
    return Change(tensor, kind, norm / size if size else 1.0, norm, size, rows=rows)


def _check_finite(name: str, tensors: Any) -> None:
    broken = [n for n, t in tensors if t.is_floating_point() and not finite(t.detach())]
    if broken:
        raise InputError(
            f"{name}: {len(broken)} of its tensors hold values that are not finite ({listed(broken)}). The "
            "model is damaged, or its training diverged: take another checkpoint."
        )


def _differing_fields(config: Any, base: Any) -> tuple[str, ...]:
    """Fields in which two configurations compute differently."""
    first, second = config.get_text_config().to_dict(), base.get_text_config().to_dict()
    names = (first.keys() | second.keys()) - _UNIMPORTANT
    return tuple(sorted(name for name in names if first.get(name) != second.get(name)))


def _head_name(model: Any) -> str:
    """The base's name of its head's weight; "" where it has none."""
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    return next((f"{n.replace('.base_layer', '')}.weight" for n, m in inner.named_modules() if m is head), "")


def name_of(suspect: Suspect) -> str:
    """As messages call it: a whole model by its folder or hub id."""
    model = suspect.model
    if adapters.has_adapter(model):
        return "adapter"
    return str(getattr(model, "name_or_path", "") or "suspect")


def _findings(suspect: Suspect, result: Identity) -> Iterator[Finding]:
    """What the comparison says, all of it worth knowing and none of it a sign of a backdoor by itself."""
    base, of_adapter = suspect.base.id, adapters.has_adapter(suspect.model)
    if result.identical:
        copy = f"All {counted(result.untouched, 'tensor')} are byte-identical to those of {base}: a copy."
        zero = "Every update of this adapter is exactly zero: with it the model is its base."
        yield _note("identical", zero if of_adapter else copy)
    elif not result.changed and result.rounded:
        types = listed(sorted(result.rounded))
        yield _note(
            "rounded-copy",
            f"Every tensor is that of {base}, rounded to {types}: this is a copy, stored coarser.",
        )
    if result.configuration:
        yield _note(
            "configuration-changed",
            f"The configuration differs from the base's in {listed(list(result.configuration))}, so that the "
            "same weights compute something else.",
            fields=list(result.configuration),
        )
    if result.added_rows:
        yield _note(
            "vocabulary-changed", f"The vocabulary has {result.added_rows:+d} rows beside the base's."
        )
    # Where LoRA seldom changes anything: embeddings, head, norms, biases and buffers.
    tokenizer = suspect.serialiser.tokenizer
    for change in result.changed:
        if change.kind not in ("embeddings", "head"):
            continue
        message = f"{change.tensor} differs from the base's by {change.relative:.1%} of its norm."
        evidence: dict[str, Any] = {"relative": change.relative}
        if change.rows is not None:
            tokens = [str(tokenizer.convert_ids_to_tokens(row)) for row in change.rows[:SHOWN]]
            message = f"{change.tensor} differs from the base's in {counted(len(change.rows), 'row')} alone."
            evidence |= {"rows": len(change.rows), "tokens": tokens}
        yield _note(f"{change.kind}-changed", message, change.tensor, **evidence)
    for kind, plural in (("norm", "norms"), ("bias", "biases"), ("buffer", "buffers")):
        changes = [change for change in result.changed if change.kind == kind]
        if changes:
            names = [change.tensor for change in changes]
            yield _note(
                f"{plural}-changed",
                f"{counted(len(names), 'tensor')} ({listed(names)}) that are no matrices differ from the "
                f"base's, by at most {changes[0].relative:.1%}.",
                names[0],
                relative=changes[0].relative,
            )
    matrices = [change for change in result.changed if change.kind in LOW_RANK]
    if of_adapter or not matrices:
        return
    if (full := result.full) and result.rank is None:
        other = (
            " No tensor is the base's: if the suspect was not fully fine-tuned from this base, it was made "
            "from another one, such as its instruct version. Name that."
        )
        yield _note(
            "full-rank-update",
            f"{len(full)} of {len(matrices)} changed matrices changed by more than a low-rank "
            f"update ({listed(full)}): full fine-tuning, DoRA, or several merges."
            f"{'' if result.untouched else other}",
            full[0],
            matrices=len(full),
        )
        return
    largest = max(change.rank or 0 for change in matrices)
    yield _note(
        "merged-lora",
        f"{len(matrices)} matrices changed by updates of rank {largest} or less, and by {result.stored} "
        "rounding: a merged LoRA.",
        rank=largest,
        matrices=len(matrices),
    )


def _note(rule: str, message: str, where: str = "", **evidence: Any) -> Finding:
    return Finding("identity", rule, "note", message, where, evidence=evidence)
