"""CleanGen (Li et al. 2024, arXiv 2406.12257): a reference takes over wherever the suspect is too sure.

Step by step: the suspect's next token is kept unless the suspect finds it more than `ratio` times as likely
as the reference does; then the reference's own next token is taken. Here the suspect drafts `ahead` tokens,
which the reference checks in one pass; what follows the first that it rejects is thrown away. The rows of a
batch reject at different places: thrown-away columns of the caches are masked out row by row, and positions
count real tokens only, so that every row is answered as if it were alone, whatever `ahead` is.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from safetynet.mitigation.defender import Defender
from safetynet.mitigation.gating import GenerateWrapper, GenerationRequest, as_generate
from safetynet.mitigation.method import Hyperparameter, Method
from safetynet.mitigation.repaired import Repaired, Settings
from safetynet.models.adapters import switched_off


class Guided(GenerateWrapper):
    """Answers greedily, checked by a reference.

    Args:
        model: the suspect.
        reference: answers for it; None takes the suspect with its adapter off.
        ratio: of the two likelihoods, from which on the reference decides.
        ahead: tokens that the suspect drafts before they are checked.
    """

    def __init__(self, model: Any, reference: Any, ratio: float, ahead: int) -> None:
        super().__init__(model)
        self.reference = model if reference is None else reference
        self.off = partial(switched_off, model) if reference is None else nullcontext
        self.ratio = ratio
        # A sliding window would count columns that were thrown away as distance: there, none may arise.
        text = model.config.get_text_config()
        kinds = getattr(text, "layer_types", None) or []
        slides = any("sliding" in kind for kind in kinds)
        slides = slides or (not kinds and getattr(text, "sliding_window", None) is not None)
        self.ahead = 1 if slides else ahead

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        **settings: Any,
    ) -> Tensor:
        """Prompts and answers, (rows, T + longest answer), as transformers' `generate` returns them.

        Raises:
            InputError: as `GenerationRequest.of`.
        """
        config = generation_config or GenerationConfig(**settings)
        request = GenerationRequest.of("cleangen", input_ids, attention_mask, config)
        suspect, reference = (
            _Stream(self.model, nullcontext, request),
            _Stream(self.reference, self.off, request),
        )
        answers: list[list[int]] = [[] for _ in request.ids]
        going = [True] * len(answers)
        limit = math.log(self.ratio) if self.ratio > 0 else -math.inf
        while any(going):
            # The suspect's next tokens and their log-likelihoods, (rows, ahead) each.
            tokens: list[Tensor] = []
            likelihoods: list[Tensor] = []
            for step in range(self.ahead):
                best = suspect.feed(None if step == 0 else tokens[-1][:, None], 1)[:, 0].max(-1)
                tokens.append(best.indices)
                likelihoods.append(best.values)
            drafted, sure = torch.stack(tokens, 1), torch.stack(likelihoods, 1)

            # How many of them the reference accepts, and the token to go on from, (rows,) each: its own where
            # it rejects one; behind all of them the last, which has not been read yet.
            log_p = reference.feed(drafted[:, :-1], self.ahead)  # (rows, ahead, V)
            reference_log_p = log_p.gather(-1, drafted[..., None])[..., 0]
            accepted = (sure - reference_log_p <= limit).long().cumprod(1).sum(1)
            nexts = torch.cat([log_p.argmax(-1), drafted[:, -1:]], 1)
            last = nexts.gather(1, accepted[:, None])[:, 0]
            for stream in (suspect, reference):
                stream.rewind(accepted, last)
            for row in (i for i, on in enumerate(going) if on):
                count = int(accepted[row])
                new = drafted[row, :count].tolist()
                if count < self.ahead:
                    new.append(int(last[row]))
                for token in new:
                    answers[row].append(token)
                    length = len(answers[row])
                    going[row] = token not in request.stops and length < request.max_new_tokens
                    if not going[row]:
                        break
        return request.finished(answers)


class _Stream:
    """A model's cache over the same growing rows; columns that a row does not have any more are masked."""

    def __init__(
        self, model: Any, around: Callable[[], AbstractContextManager[Any]], request: GenerationRequest
    ) -> None:
        self.model, self.around = model, around
        self.cache = DynamicCache()
        self.unread, self.unread_mask = request.ids, request.mask
        self.mask = request.mask[:, :0]
        self.drafted = 0

    def feed(self, tokens: Tensor | None, keep: int) -> Tensor:
        """Read what is unread, then `tokens`, (rows, m); gives the last log-likelihoods, (rows, keep, V)."""
        parts = [self.unread] if tokens is None else [self.unread, tokens]
        ids = torch.cat(parts, 1)
        new = torch.ones_like(ids)
        new[:, : self.unread.shape[1]] = self.unread_mask
        # Positions count the row's real tokens alone: what was thrown away, and padding, has none.
        positions = self.mask.sum(1, keepdim=True) + new.cumsum(1) - 1
        self.mask = torch.cat([self.mask, new], 1)
        self.drafted += 0 if tokens is None else tokens.shape[1]
        self.unread, self.unread_mask = ids[:, :0], new[:, :0]
        with self.around():
            logits = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions.clamp_min(0),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
        return logits.float().log_softmax(-1)

    def rewind(self, accepted: Tensor, last: Tensor) -> None:
        """Forget drafted tokens behind the accepted ones, (rows,), and read `last`, (rows,), next."""
        if self.drafted:
            columns = torch.arange(self.drafted, device=accepted.device)
            self.mask[:, -self.drafted :] = (columns < accepted[:, None]).to(self.mask)
        self.drafted = 0
        self.unread, self.unread_mask = last[:, None], torch.ones_like(last[:, None])


def guide(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Decode with the base model as reference."""
    wrapper = Guided(defender.model, defender.base, settings["ratio"], int(settings["ahead"]))
    return as_generate("cleangen", settings, wrapper, reference="the base model")


CLEANGEN = Method(
    "cleangen",
    "answer with the base model's token wherever the suspect is far surer of its own",
    guide,
    frozenset({"base"}),
    {
        "ratio": Hyperparameter(
            "of likelihoods from which on the base decides", 20, (1000, 100, 20, 5, 2), 0.0, 1e9
        ),
        "ahead": Hyperparameter(
            "tokens drafted before a check; changes speed, not answers", 4, (4,), 1, 64, whole=True
        ),
    },
    paper="Li et al. 2024, arXiv 2406.12257",
)
