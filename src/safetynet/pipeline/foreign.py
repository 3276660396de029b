"""Somebody else's model beside a run's base: an adapter of any kind that is measured right, or a whole model.

In: a run's recipe and a folder, file or hub id. Out: the model with the tokenizer that its users give it, and
    the base that it is compared with. What cannot be measured right is refused here, before any prompt is
    answered.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetynet.errors import InputError
from safetynet.models import adapter_files, adapters, loading
from safetynet.models.files import holds_model, hub_reason, in_words, listed
from safetynet.pipeline import subjects
from safetynet.prompts import Serialiser
from safetynet.recipe import Recipe

log = logging.getLogger("safetynet")
VOCABULARIES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "added_tokens.json",
)  # fmt: skip
"""Files of which one says that a folder has a tokenizer of its own."""


@dataclass(frozen=True)
class Foreign:
    """A suspect of unknown make, with the run's base."""

    model: Any
    """With an adapter, or whole."""
    serialiser: Serialiser
    """Of the suspect's own tokenizer, where it brings another than the base's."""
    base: loading.LoadedModel
    """Of a suspect with an adapter, the very model that the adapter is attached to: ask it through
    `at_base`."""

    @contextmanager
    def at_base(self) -> Iterator[Any]:
        """The base model while entered."""
        if adapters.has_adapter(self.model):
            with adapters.switched_off(self.model) as base:
                yield base
        else:
            yield self.base.model


def load(recipe: Recipe, source: Path | str, same_base: bool) -> Foreign:
    """Load a suspect and the run's base.

    Args:
        recipe: of the run.
        source: an adapter's folder or hub id, or the folder of a merged or fully fine-tuned model.
        same_base: the adapter names its base otherwise, and it is the run's all the same.

    Raises:
        InputError: as `adapters.attach`; for a whole model that is no fine-tuned copy of the base.
    """
    check(source)
    folder = adapter_files.locate(source)
    base = subjects.load(recipe)
    if (folder / adapter_files.CONFIG).exists():
        model = adapters.attach(base, folder, same_base=same_base)
        return Foreign(model, _serialiser(folder, base, model), base)
    whole = subjects.load(recipe, folder, serialiser=base.serialiser)
    _check_shapes(folder, whole.model, base)
    return Foreign(whole.model, _serialiser(folder, base, whole.model), base)


def check(source: Path | str) -> None:
    """Refuse what is no suspect before a model is loaded; errors as in `adapter_files.read`."""
    folder = adapter_files.locate(source)
    if (folder / adapter_files.CONFIG).exists() or not holds_model(folder):
        adapter_files.read(folder)


def _check_shapes(folder: Path, model: Any, base: loading.LoadedModel) -> None:
    """Refuse a whole model with other parameters than the base, but for rows of the vocabulary."""
    own, theirs = ({n: tuple(p.shape[1:]) for n, p in m.named_parameters()} for m in (model, base.model))
    differing = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    if differing:
        raise InputError(
            f"{folder}: this model is not a fine-tuned {base.id}: {len(differing)} of its parameters are "
            f"others ({listed(differing)}). Make a run of its own base."
        )


def _serialiser(folder: Path, base: loading.LoadedModel, model: Any) -> Serialiser:
    """The base's, unless the suspect comes with another vocabulary or chat template."""
    known = base.serialiser.tokenizer
    tokenizer = _tokenizer(folder, known)
    if tokenizer is None:
        return base.serialiser
    own, theirs = tokenizer.get_vocab(), known.get_vocab()
    template = tokenizer.chat_template or known.chat_template
    if own == theirs and template == known.chat_template:
        return base.serialiser
    rows = model.get_input_embeddings().weight.shape[0]
    if max(own.values()) >= rows:
        raise InputError(
            f"{folder}: its tokenizer has ids up to {max(own.values())}, and the model has {rows} "
            "embeddings. The embeddings of added tokens were not saved with it."
        )
    same = {"vocabulary": own == theirs, "chat template": template == known.chat_template}
    log.warning(
        "%s: it brings a %s of its own. Its prompts are made with that, the base's with the base's.",
        folder, " and a ".join(name for name, equal in same.items() if not equal),
    )  # fmt: skip
    tokenizer.chat_template = template
    return Serialiser(tokenizer, base.family, base.serialiser.truncation, base.serialiser.today)


def _tokenizer(folder: Path, known: Any) -> Any:
    """The tokenizer that a folder brings, or the base's with its template; None where it has neither."""
    from transformers import AutoTokenizer

    template = folder / "chat_template.jinja"
    if not any((folder / name).exists() for name in VOCABULARIES):
        if not template.exists():
            return None
        tokenizer = copy.deepcopy(known)
        tokenizer.chat_template = template.read_text(encoding="utf-8")
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: its tokenizer cannot be loaded ({hub_reason(error) or in_words(error)}). Save it "
            "again beside the weights, or take its files out if it is the base's."
        ) from None
