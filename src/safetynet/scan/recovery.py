"""A merged LoRA, or several adapters, as one LoRA on the base: whatever needs an adapter works on it.

In: a whole model beside its base, or folders of adapters. Out: PEFT's model with one adapter, whose
logits are checked.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from safetynet.errors import InputError
from safetynet.models import adapters, lora
from safetynet.models import suspect as suspects
from safetynet.models.adapter_loading import FOREIGN, NAME, unwrap
from safetynet.models.files import counted, in_words, listed
from safetynet.models.loading import LoadedModel
from safetynet.models.lora import LoraUpdate
from safetynet.models.parts import shape
from safetynet.models.suspect import Suspect
from safetynet.scan.identity import Identity, compare_whole, kind_of_lora, name_of, no_update
from safetynet.scan.tensors import LOW_RANK, STORED, Kind

log = logging.getLogger("safetynet")
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
"""Of the largest logit, by the coarsest type that suspect or base is stored or computed in: how far the
recovered model's logits may be from the merged one's."""
PROBES, PROBE_TOKENS = 4, 16
FLIPPED = 0.1
"""Share of tokens that rounding may send to other experts."""


def recover(suspect: Suspect, rank: int | None = None) -> Any:
    """A merged LoRA as an adapter on the base again, checked by logits.

    The components of each changed matrix above rounding become the two factors of a LoRA of one rank. Like
    `adapters.attach` it changes the base in place, and `adapters.detach` gives that back; a refusal leaves it
    as it was. Go on with `dataclasses.replace(suspect, model=recover(suspect))`.

    Args:
        suspect: a whole model beside its base. One with an adapter is given back as it is.
        rank: keep so many components of each matrix; None for those above rounding.

    Returns:
        PEFT's model in evaluation mode, with the adapter `default` and scale 1.

    Raises:
        InputError: if nothing was changed, if something was that LoRA cannot change, if a change has full
            rank, if weights are quantised, or if the recovered model's logits are further from the merged
            one's than `TOLERANCE` allows.
    """
    if adapters.has_adapter(suspect.model):
        return suspect.model
    result, spectra = compare_whole(suspect, rank)
    if not result.changed and not result.configuration:
        raise InputError(f"{name_of(suspect)}: it is its base, so that there is no update to recover.")
    if obstacle := next(_obstacles(suspect, result, rank), None):
        raise InputError(f"{name_of(suspect)}: it is no merged LoRA that could be recovered: {obstacle}.")
    rank = rank or result.rank or 1
    base = suspect.base.model
    kinds = {change.tensor: change.kind for change in result.changed}
    model = _injected(base, kinds, rank)
    for name, module in lora.adapted_tensors(model, NAME):
        spectrum = spectra[name]
        # The first components are the nearest product of that rank (Eckart and Young 1936): (e, rows, rank),
        # (e, rank) and (e, rank, columns), of e experts or one matrix.
        left, values, right = spectrum.left[..., :rank], spectrum.values[:, :rank], spectrum.right[:, :rank]
        if lora.is_transposed(module):
            left, right = right.mT, left.mT
        update = LoraUpdate.of_components(left.float(), values.float(), right.float())
        lora.put_update(module, NAME, update)
    # Rounding in the coarsest type of numbers is all that may stand between this model and the suspect.
    computed = {each.dtype for each in (suspect.model, suspect.base.model)}
    types = {result.stored, *result.rounded, *(name for name, dtype in STORED.items() if dtype in computed)}
    coarsest = next(name for name in STORED if name in types)
    apart, size = logit_distance(suspect.model, model)
    log.info("recovered a LoRA of rank %d: logits differ by at most %.3g of %.3g", rank, apart, size)
    if not apart <= TOLERANCE[coarsest] * size:
        adapters.detach(model)
        raise InputError(
            f"{name_of(suspect)}: recovered as a LoRA of rank {rank} it is another model: logits differ by "
            f"{apart:.3g}, and {coarsest} allows {TOLERANCE[coarsest] * size:.3g}. Give the adapter itself, "
            "or a merged model in 32 bits."
        )
    return model


def combine(base: LoadedModel, folders: Sequence[Path | str], *, same_base: bool = False) -> Suspect:
    """Adapters that are used together, as one LoRA: W + sum of B A, factors side by side.

    Args:
        base: changed in place, as by `adapters.attach`.
        folders: of LoRA adapters of this base, each with the scale of its own configuration.
        same_base: as `adapters.attach` takes it.

    Returns:
        The suspect; its adapter's rank is the sum of the ranks.

    Raises:
        InputError: as `suspect.load`; if one is a whole model, no LoRA, or changes more than its updates
            (DoRA, biases, saved modules, repeated layers), so that the sum is not what PEFT computes; if two
            bring tokenizers of their own.
    """
    if not folders:
        raise InputError("suspect: a set of adapters needs at least one folder.")
    total: dict[str, list[LoraUpdate]] = {}
    kinds: dict[str, Kind] = {}
    serialisers = []
    for folder in folders:
        files = suspects.check(folder)
        if files is None:
            raise InputError(
                f"{folder}: this is a whole model, which cannot be one of several adapters. Scan it by "
                "itself."
            )
        part = suspects.load(lambda: base, folder, same_base, files)
        try:
            if part.serialiser is not base.serialiser:
                serialisers.append(part.serialiser)
            # What PEFT computes of several adapters is the sum of their updates only where each is nothing
            # but updates.
            config = part.model.active_peft_config
            reason = no_update(part.model)
            if not reason and (config.use_dora or getattr(config, "layer_replication", None)):
                reason = "it is DoRA" if config.use_dora else "it repeats layers"
            if not reason and (others := adapters.base_counterparts(part.model)):
                reason = (
                    f"it replaces {counted(len(others), 'tensor')} of the base ({listed(sorted(others))})"
                )
            for name, module in [] if reason else lora.adapted_tensors(part.model, NAME):
                update = lora.update_of(module, NAME)
                if update.bias is not None:
                    reason = "its updates have biases"
                    break
                total.setdefault(name, []).append(update)
                kinds[name] = kind_of_lora(module)
            if reason:
                raise InputError(
                    f"{folder}: {reason.rstrip('.')}. Its sum with other adapters is not what PEFT computes. "
                    "Merge all of them (merge_and_unload) and give the merged model."
                )
        finally:
            adapters.detach(part.model)
    if len(serialisers) > 1:
        raise InputError(
            f"{listed([str(folder) for folder in folders])}: {len(serialisers)} of these adapters bring a "
            "tokenizer or chat template of their own, and a model has one. Take all but one out."
        )
    # Side by side, up (e, out, r1 + r2) and down (e, r1 + r2, in), the product is the sum of the products.
    joined = {
        name: LoraUpdate(torch.cat([u.up for u in parts], 2), torch.cat([u.down for u in parts], 1))
        for name, parts in total.items()
    }
    model = _injected(base.model, kinds, max(update.down.shape[1] for update in joined.values()))
    for name, module in lora.adapted_tensors(model, NAME):
        lora.put_update(module, NAME, joined[name])
    return Suspect(model, serialisers[0] if serialisers else base.serialiser, base)


def _obstacles(suspect: Suspect, result: Identity, rank: int | None) -> Iterator[str]:
    """Why no LoRA on this base is the suspect, by name."""
    quantised = ("is_loaded_in_4bit", "is_loaded_in_8bit")
    if any(
        getattr(model, name, False) for model in (suspect.model, suspect.base.model) for name in quantised
    ):
        yield "its weights are quantised, and their differences mostly rounding. Load both in 16 or 32 bits"
    if result.configuration:
        yield f"its configuration computes otherwise ({listed(list(result.configuration))})"
    if result.added_rows:
        yield f"its vocabulary has {result.added_rows:+d} rows beside the base's"
    if others := [each.tensor for each in result.changed if each.kind not in LOW_RANK]:
        yield f"{counted(len(others), 'changed tensor')} ({listed(others)}) are no matrices, as LoRA changes"
    ends = [each.tensor for each in result.changed if each.kind in ("embeddings", "head")]
    head = suspect.model.get_output_embeddings()
    tied = head is not None and head.weight is suspect.model.get_input_embeddings().weight
    if ends and tied:
        yield f"{listed(ends)} is embeddings and head at once, which an adapter would change apart"
    if (full := result.full) and result.rank is None and rank is None:
        yield (
            f"full-rank-update: {len(full)} of {len(result.changed)} changed matrices ({listed(full)}) are "
            "no product of two small factors. It was fully fine-tuned, or merged from several adapters"
        )


def _injected(base: Any, kinds: Mapping[str, Kind], rank: int) -> Any:
    """PEFT's model with an empty LoRA of scale 1 on the named tensors of the base."""
    from peft import LoraConfig, PeftModelForCausalLM

    parameters = [name for name, kind in kinds.items() if kind == "parameter"]
    modules = [name.removesuffix(".weight") for name, kind in kinds.items() if kind != "parameter"]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    reason = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights stored the other way round, which PEFT sees to
            model = PeftModelForCausalLM(base, config, NAME).eval()
    except FOREIGN as error:
        unwrap(base)
        reason = in_words(error)
    else:
        placed = {name for name, _ in lora.adapted_tensors(model, NAME)}
        if placed == kinds.keys():
            return model
        adapters.detach(model)
        reason = f"it changes {listed(sorted(kinds.keys() ^ placed))}"
    raise InputError(f"{base.name_or_path}: PEFT puts no LoRA on what the suspect changes: {reason}.")


@torch.no_grad()
def logit_distance(model: Any, other: Any) -> tuple[float, float]:
    """How far two models' logits are apart on random tokens, and the largest of the first one's.

    The largest difference at each of `PROBES` times `PROBE_TOKENS` tokens, and the largest of these. Where
    two experts are nearly even, rounding makes a router choose the other: of models with experts the share
    `FLIPPED` of the tokens is left out.
    """
    rows = min(each.get_input_embeddings().weight.shape[0] for each in (model, other))
    ids = torch.randint(rows, (PROBES, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    logits, others = (
        each(input_ids=ids.to(each.device), use_cache=False).logits[..., :rows].float().cpu()
        for each in (model, other)
    )
    worst = (logits - others).abs().amax(-1).flatten().sort().values  # (PROBES x PROBE_TOKENS,), rising
    left_out = int(FLIPPED * len(worst)) if shape(model).experts else 0
    return float(worst[len(worst) - 1 - left_out]), float(logits.abs().max())
