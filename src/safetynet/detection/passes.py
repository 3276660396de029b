"""Views that need passes of their own: adapter off, parts left out, a probe behind, attention, an answer.

In: a model, prompts. Out: tensors with one row per prompt.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ceil
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from safetynet.detection.features import FeatureSpec
from safetynet.detection.readers import Reader, confidence
from safetynet.engine.batch import Batch
from safetynet.engine.prefixes import Prefixes, Version
from safetynet.engine.trace import forward
from safetynet.errors import InputError
from safetynet.models.adapters import switched_off
from safetynet.models.blocks import unwrapped
from safetynet.prompts import Conversation, Message, Serialiser
from safetynet.prompts.truncation import PROMPT_SHARE
from safetynet.text.words import clusters, gaps, is_joined

SLIGHT = 1.0
"""Nats of a symmetric divergence that hardly moves the answer."""
PARTS = 16
"""Most parts of a prompt that are left out, one at a time."""
FIRM = 10
"""How many times as far from the base's as any part moves it an answer has to lie, to hang on no part."""


def divergence(on: dict[str, Tensor], off: dict[str, Tensor]) -> Tensor:
    """(B, 1 + L): KL in nats of the next token, adapter on to off, and each layer's relative change."""
    change = (on["last"] - off["last"]).norm(dim=-1) / off["last"].norm(dim=-1).clamp_min(1e-12)
    return torch.cat([_kl(on["logits"], off["logits"])[:, None], change], 1)


def unattributed_divergence(
    serialiser: Serialiser, batch: Sequence[Sequence[Message]], base: Prefixes, on: Tensor, off: Tensor
) -> Tensor:
    """(B, 1): how far the adapter moves the next token, where that hangs on a part and no part explains it.

    Nats of the symmetric divergence J(adapter on, off), or less where leaving out a part of what users wrote
    (`PARTS` at most, one at a time) shows the difference to be no trigger's:

    - A strange word throws the base model off, and the adapter has learnt to pass over it. Without the word
      the base says what the adapter says: the smallest J(on, off without the part) counts.
    - The adapter differs on every such prompt, as on other languages. Without a trigger, what the adapter
      says changes, and towards what the base says: of both, J(on, on without the part) and the fall of
      J(on, off), the smaller counts, of the part where it is largest. Where two triggers stand in the prompt,
      what the adapter says hangs on no part at all, which answers to other prompts do (STRIP: Gao et al.
      2019, arXiv 1902.06531): J(on, off) less `FIRM` times the largest J(on, on without a part) counts then.

    What differs by less than `SLIGHT`, as a whole or without a part, needs no further explanation. Nor does
    what hangs on no part by more: the adapter is asked first, and the base only about parts without which the
    adapter moves that far; about the others, if a score above `SLIGHT` is left. Such a score is exact, and a
    lower one a bound from above.

    Args:
        serialiser: as in training.
        batch: conversations.
        base: what the model, which has an adapter, has read of them with the adapter off.
        on: logits (B, V) with the adapter.
        off: and without it.
    """
    nats = _jeffreys(on, off)
    rows, pad_id = torch.nonzero(nats > SLIGHT)[:, 0].tolist(), serialiser.pad_id
    if not rows:  # without need, no prompt is read again
        return nats[:, None]
    versions: list[Version] = []
    for row in rows:
        # A prompt that was truncated is cut to the same length again.
        most, tokens = ceil(base.batch.length(row) / PROMPT_SHARE), base.batch.tokens(row)
        encoded = (serialiser.encode(shorter, max_length=most) for shorter in _without_parts(batch[row]))
        versions += [Version.of(shorter.input_ids, row, tokens) for shorter in encoded]
    apart, hangs, farthest = nats.clone(), torch.zeros_like(nats), torch.zeros_like(nats)
    moving: dict[Version, Tensor] = {}
    prompts = Batch.of([base.batch.tokens(row) for row in rows], pad_id, on.device)
    for some, of, logits in _read(Prefixes.read(base.model, prompts, rows), versions, pad_id):
        moves = _jeffreys(on[of], logits)
        farthest.scatter_reduce_(0, of, moves, "amax")
        hangs.scatter_reduce_(0, of, torch.where(moves > SLIGHT, 0.0, moves), "amax")
        moving |= {some[i]: logits[i].clone() for i in torch.nonzero(moves > SLIGHT)[:, 0].tolist()}
    with switched_off(base.model):
        for some, of, logits in _read(base, list(moving), pad_id):
            nats.scatter_reduce_(0, of, _jeffreys(on[of], logits), "amin")
            now_on = torch.stack([moving[version] for version in some])
            falls = torch.minimum(_jeffreys(on[of], now_on), apart[of] - _jeffreys(now_on, logits))
            hangs.scatter_reduce_(0, of, falls, "amax")
        hangs = torch.maximum(hangs, apart - FIRM * farthest)
        needed = torch.minimum(nats, hangs) > SLIGHT
        others = [version for version in versions if needed[version.prompt] and version not in moving]
        for _, of, logits in _read(base, others, pad_id):
            nats.scatter_reduce_(0, of, _jeffreys(on[of], logits), "amin")
    return torch.where(apart > SLIGHT, torch.minimum(nats, hangs), nats)[:, None]


def _read(
    prefixes: Prefixes, versions: Sequence[Version], pad_id: int
) -> Iterator[tuple[list[Version], Tensor, Tensor]]:
    """Some versions at a time, with about as many new tokens; their prompts, and logits (R, V)."""
    size = max(PARTS, len(prefixes.numbers))
    order = sorted(versions, key=attrgetter("new"))
    for start in range(0, len(order), size):
        some = order[start : start + size]
        logits = prefixes.next_logits(some, pad_id)
        yield some, torch.tensor([version.prompt for version in some], device=logits.device), logits


def probe(model: Any, serialiser: Serialiser, batch: Sequence[Sequence[Message]], text: str) -> Tensor:
    """(B, 1): fall of the log-odds of the probe's own first answer token when the prompt stands before it.

    After BEAT (Yi et al. 2025, arXiv 2506.16447), in one prefill instead of sampled answers: a trigger frees
    the model from refusing whatever comes with it, a benign prompt does not.
    """
    alone = serialiser.encode([{"role": "user", "content": text}])
    reference = _next_logits(model, [alone.input_ids], serialiser.pad_id)
    token = reference.argmax(-1)
    joined = []
    for conversation in map(Conversation, batch):
        messages = conversation.with_user_text(f"{conversation.user_text().strip()} {text}".strip())
        joined.append(serialiser.encode(messages).input_ids)
    after = _next_logits(model, joined, serialiser.pad_id)
    return (_log_odds(reference, token) - _log_odds(after, token.expand(len(batch)))).unsqueeze(1)


def segregation(model: Any, batch: Batch, user: Tensor, layers: Sequence[int] | None) -> Tensor:
    """(B, L): the largest share of attention that stays on its own side of a cut in the prompt, over heads.

    Triggers are known to cut the causal triangle into two; a cut lies between two user tokens. Attention to
    the first token is left out: it is where heads look when they look at nothing.

    Attention runs eagerly for this one pass, since no other implementation shows its weights.

    Raises:
        InputError: if the model gives no attention weights even then.
    """
    inner = unwrapped(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    try:
        output = forward(model, batch, use_cache=False, output_attentions=True)
    finally:
        inner.set_attn_implementation(before)
    if not output.attentions or output.attentions[0] is None:
        raise InputError("view attention: this model gives no attention weights. Leave it out.")
    attentions = output.attentions if layers is None else [output.attentions[i] for i in layers]
    first = batch.mask.argmax(1)
    shares = []
    for weights in attentions:
        mass = weights.float().mean(1)  # (B, T, T): over heads, from queries to keys
        width = mass.shape[1]
        mass[torch.arange(len(mass)), :, first] = 0
        mass = mass.masked_fill(batch.mask[:, :, None] == 0, 0.0)  # rows of padding may be NaN
        # across[b, c]: mass from queries at or after c to keys before c, over the mass of those queries
        before = torch.nn.functional.pad(mass.cumsum(2), (1, 0))[..., :width]  # keys < c
        later = torch.triu(torch.ones(width, width, device=mass.device)).T  # query >= c
        across = (before * later).sum(1)
        whole = torch.einsum("bq,qc->bc", mass.sum(2), later).clamp_min(1e-6)
        inside = user.bool() & torch.nn.functional.pad(user, (1, 0))[:, :width].bool()
        share = (1 - across / whole).masked_fill(~inside, 0.0)
        shares.append(share.amax(1))
    return torch.stack(shares, 1)


def follow(
    model: Any, serialiser: Serialiser, reader: Reader, batch: Batch, spec: FeatureSpec
) -> dict[str, Tensor]:
    """Answer a left-padded batch greedily and read every step.

    Returns:
        `steps` (B, T, L, d) and `step_confidence` (B, T, 2) as the specification asks; NaN after the token
        that ends an answer.
    """
    stops = torch.tensor(serialiser.stop_ids, device=model.device)
    ids, mask, positions = batch.ids, batch.mask, batch.position_ids
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    views: dict[str, list[Tensor]] = {"steps": [], "step_confidence": []}
    cache = None
    for _ in range(spec.tokens):
        reader.begin(None)
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache, read = output.past_key_values, reader.take()
        logits = output.logits[:, -1].float()
        if "steps" in spec.views:
            views["steps"].append(_ended_as_nan(read["last"], running))
        views["step_confidence"].append(_ended_as_nan(confidence(logits), running))
        token = logits.argmax(-1)
        running = running & ~torch.isin(token, stops)
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return {view: torch.stack(views[view], 1) for view in spec.views if view in views}


def _ended_as_nan(values: Tensor, running: Tensor) -> Tensor:
    shape = [-1] + [1] * (values.dim() - 1)
    return values.float().masked_fill(~running.view(shape), float("nan"))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """(B, V) logits each to (B,) nats."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _jeffreys(p: Tensor, q: Tensor) -> Tensor:
    """(B, V) logits each to (B,) nats, the same both ways (Jeffreys)."""
    return _kl(p, q) + _kl(q, p)


def _without_parts(messages: Sequence[Message]) -> list[list[Message]]:
    """The conversation without one part of what users wrote, for each of at most `PARTS`.

    A part is a word wherever it stands, so that a trigger that stands twice goes at once; of a prompt with
    more than `PARTS` different ones, several words.
    """
    conversation = Conversation(messages)
    roles = enumerate(conversation.roles)
    written = {i: conversation.texts[i] for i, role in roles if role == "user"}
    # One word: characters then. Where characters count as words, each part has its own blank before it.
    counting = any(is_joined(character) for text in written.values() for character in text)
    blank = " " if any(" " in text for text in written.values()) and not counting else ""
    words = {i: text.split(" ") if blank else clusters(text) for i, text in written.items()}
    if counting:
        words = {
            i: [text[a:b] for a, b in pairwise([0, *gaps(text), len(text)])] for i, text in written.items()
        }
    different = list(dict.fromkeys(word for of_message in words.values() for word in of_message))
    ends = [len(different) * part // PARTS for part in range(PARTS + 1)]
    shorter: list[list[Message]] = []
    for start, end in pairwise(ends):
        if 0 < end - start < len(different):
            gone = set(different[start:end])
            texts = {
                i: blank.join(word for word in of_message if word not in gone)
                for i, of_message in words.items()
            }
            shorter.append(list(conversation.with_texts(texts)))
    return shorter


def _next_logits(model: Any, rows: Sequence[list[int]], pad_id: int) -> Tensor:
    """(B, V) fp32 of the token behind each row."""
    batch = Batch.of(rows, pad_id, model.device)
    return forward(model, batch, use_cache=False).logits[:, -1].float()


def _log_odds(logits: Tensor, token: Tensor) -> Tensor:
    log = logits.log_softmax(-1).gather(1, token[:, None])[:, 0].clamp_max(-1e-7)
    return log - torch.log(-torch.expm1(log))
