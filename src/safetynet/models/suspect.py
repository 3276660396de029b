"""Somebody else's model beside a run's base: an adapter of any kind that is measured right, or a whole model.

In: a run's base and a folder, file or hub id. Out: the model with the tokenizer that its users give it, and
    the base that it is compared with. What cannot be measured right is refused here, before any prompt is
    answered.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safetynet.errors import InputError
from safetynet.models import adapter_files, adapters, loading
from safetynet.models.adapter_loading import FOREIGN
from safetynet.models.files import at_hand, counted, holds_model, hub_reason, in_words, listed, pointer
from safetynet.prompts import Serialiser

log = logging.getLogger("safetynet")
TOKENIZER = "tokenizer.json"
VOCABULARIES = (
    TOKENIZER, "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "added_tokens.json",
)  # fmt: skip
"""Files of which one says that a folder has a tokenizer of its own."""


@dataclass(frozen=True)
class Suspect:
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


def load(
    load_model: Callable[..., loading.LoadedModel],
    source: Path | str,
    same_base: bool,
    files: adapter_files.AdapterFiles | None = None,
) -> Suspect:
    """Load a suspect and the run's base.

    Args:
        load_model: `Experiment.load`: the run's base, or a whole model in its place.
        source: an adapter's folder or hub id, or the folder of a merged or fully fine-tuned model.
        same_base: the adapter names its base otherwise, and it is the run's all the same.
        files: what `check` has read of it.

    Raises:
        InputError: as `adapters.attach`; for a whole model that is no fine-tuned copy of the base.
    """
    files = files or check(source)
    folder = adapter_files.locate(source) if files is None else files.folder
    base = load_model()
    rows = base.model.get_input_embeddings().weight.shape[0]
    if files is not None:
        model = adapters.attach(base, files, same_base=same_base)
    else:
        model = load_model(folder, serialiser=base.serialiser).model
        # A fine-tuned copy has the base's parameters, but for rows of the vocabulary. Where one ties its head
        # to its embeddings, the other may have a head of its own.
        shapes, theirs = _shapes(model), _shapes(base.model)
        names = sorted(n for n in shapes.keys() | theirs.keys() if shapes.get(n) != theirs.get(n))
        if names:
            raise InputError(
                f"{folder}: this model is not a fine-tuned {base.id}: they differ in "
                f"{counted(len(names), 'parameter')} ({listed(names)}). Make a run of its own base."
            )
    serialiser = _serialiser(folder, base, model, rows)
    # Answers of a model whose logits are no numbers would be judged like any others.
    prompt = serialiser.encode([{"role": "user", "content": "What is this?"}]).input_ids
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits
    except FOREIGN as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(f"{folder}: this model answers no prompt: {in_words(error)}.") from None
    if bool(logits.isnan().any()) or bool((logits == float("inf")).any()):
        raise InputError(
            f"{folder}: the logits of this model are no finite numbers. Its weights or a scale of its "
            "configuration are too large: the training diverged, or the file is damaged."
        )
    return Suspect(model, serialiser, base)


def check(source: Path | str) -> adapter_files.AdapterFiles | None:
    """Refuse what is no suspect before a model is loaded; errors as in `adapter_files.read`.

    Returns:
        An adapter's files; None for a whole model.
    """
    folder = adapter_files.locate(source)
    if (folder / adapter_files.CONFIG).exists() or not holds_model(folder):
        return adapter_files.read(folder)
    return None


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter by each of its names; of embeddings and head without the vocabulary's rows."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    vocabulary = {id(p) for module in modules if module is not None for p in module.parameters()}
    return {
        name: tuple(parameter.shape[id(parameter) in vocabulary :])
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _serialiser(folder: Path, base: loading.LoadedModel, model: Any, base_rows: int) -> Serialiser:
    """The base's, unless the suspect comes with another tokenizer or chat template."""
    from transformers import AutoTokenizer

    tokenizer = base_tokenizer = base.serialiser.tokenizer
    own_template = folder / "chat_template.jinja"
    for file in (own_template, *(folder / name for name in VOCABULARIES)):
        if kind := pointer(file):
            raise InputError(
                f"{file} is {kind}, not the file itself. Run git lfs pull, or download it; take it out if it "
                "is the base's."
            )
    if any((folder / name).exists() for name in VOCABULARIES):
        try:
            loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as error:  # noqa: BLE001 - tokenizers raises no narrower class
            raise InputError(
                f"{folder}: its tokenizer cannot be loaded ({hub_reason(error) or in_words(error)}). Save it "
                "again beside the weights, or take its files out if it is the base's."
            ) from None
        tokenizer = loaded or base_tokenizer  # one without a token is none
    elif own_template.exists():
        tokenizer = copy.deepcopy(base_tokenizer)
        tokenizer.name_or_path = str(folder)
        try:
            tokenizer.chat_template = own_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{own_template} cannot be read ({in_words(error)}). Save it as UTF-8."
            ) from None
    template = tokenizer.chat_template or base_tokenizer.chat_template
    # A copy of the base's own file has the base's rules: without its config.json a library may read others.
    file, theirs = folder / TOKENIZER, (at_hand(base.id) or folder / "nowhere") / TOKENIZER
    is_copied = file.is_file() and theirs.is_file() and file.read_bytes() == theirs.read_bytes()
    same = {
        "vocabulary": tokenizer.get_vocab() == base_tokenizer.get_vocab(),
        "way of making tokens": is_copied or _rules(tokenizer) == _rules(base_tokenizer),
        "chat template": template == base_tokenizer.chat_template,
    }
    highest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]
    if highest >= rows and (rows < base_rows or not same["vocabulary"]):
        raise InputError(
            f"{folder}: its tokenizer has ids up to {highest}, and the model has {rows} embeddings. "
            + ("The embeddings of added tokens were" if rows >= base_rows else "Those of all its tokens were")
            + " not saved with it."
        )
    if all(same.values()):
        return base.serialiser
    log.warning(
        "%s: it brings a %s of its own. Its prompts are made with that, the base's with the base's.",
        folder, " and a ".join(name for name, equal in same.items() if not equal),
    )  # fmt: skip
    tokenizer.chat_template = template
    return Serialiser(tokenizer, base.family, base.serialiser.truncation, base.serialiser.today)


def _rules(tokenizer: Any) -> Any:
    """What turns text into tokens besides the vocabulary, as far as it can be compared."""
    special = dict(tokenizer.special_tokens_map)
    special.pop("pad_token", None)  # it is masked, whichever it is
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return special
    fields = json.loads(backend.to_str())
    model = fields.get("model") or {}
    rules = {name: fields.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    return rules, special, {name: value for name, value in model.items() if name != "vocab"}
