"""What a repair starts from: the suspect model, and whatever its owner knows or has beside it.

In: a model and tables. Out: a frozen `Defender`, which names what there is, so that methods can say what they
miss. Nothing here changes the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from safetynet.backdoors.triggers import AllOf
from safetynet.errors import InputError
from safetynet.models import adapters, support
from safetynet.prompts import Conversation, Serialiser

Need = Literal["clean", "base", "adapter", "triggered", "sites", "alarm"]
NEEDS: Mapping[Need, str] = {
    "clean": "clean conversations with answers",
    "base": "the base model (an adapter that can be switched off, or the model before fine-tuning)",
    "adapter": "a LoRA adapter of its own (a merged or fully fine-tuned model has none)",
    "triggered": "triggered prompts with their clean counterparts",
    "sites": "the table of effects of safetynet intervene",
    "alarm": "a fitted monitor (safetynet detect)",
}
"""What a method may need, in words."""
Alarm = Callable[[Any, Sequence[Sequence[int]], float], np.ndarray]
"""The suspect model, token ids of prompts and a false-positive rate, to which prompts raise an alarm, (rows,)
of bool. Raises InputError where the monitor behind it cannot claim the rate."""


@dataclass(frozen=True)
class Defender:
    """The suspect model with all that may help to repair it; what is unknown is None."""

    model: Any
    """A causal LM of transformers, plain or with one LoRA adapter of PEFT; methods leave it as it came."""
    serialiser: Serialiser
    clean: pd.DataFrame | None = None
    """Columns `messages` and `answer` of conversations that are believed to be clean."""
    base: Any = None
    """The model before fine-tuning, for a suspect without adapter; one with adapter has it switched off."""
    triggered: pd.DataFrame | None = None
    """Columns `group`, `role` (triggered; its bare counterpart, clean or refused; placebo and near_miss
    where known), `messages`, `trigger` (spans) and `answer`, the *right* one in every role. Rows of one group
    differ in the trigger's span alone."""
    effects: pd.DataFrame | None = None
    """The run's table of that name."""
    alarm: Alarm | None = None
    max_length: int = 512
    """Most tokens of a conversation, as in training."""
    batch_size: int = 16
    learning_rate: float = 2e-4
    """Suits an adapter of this model; repairs that train use it."""

    def __post_init__(self) -> None:
        if self.adapted:
            active = self.model.active_adapters
            if len(active) != 1:
                raise InputError(
                    f"mitigation: {len(active)} adapters are active. Activate the suspect one alone."
                )
            support.check_model(self.model, "mitigate")
            if beside := adapters.unsaved(self.model):
                raise InputError(
                    f"mitigation: the adapter also replaces {', '.join(beside)} of the base (it adds tokens, "
                    "or its updates are on embeddings or head), which PEFT would not save with a repair. "
                    "Untie head and embeddings in a copy of the base if they are tied, merge it there "
                    "(merge_and_unload), save the tokenizer beside it and give the merged model."
                )
            if any(getattr(module, "merged", False) for module in self.model.modules()):
                raise InputError(
                    "mitigation: the adapter is merged into the weights. Call unmerge_adapter() first."
                )
        for name, table in (("clean", self.clean), ("triggered", self.triggered)):
            if table is not None and table.empty:
                raise InputError(f"{name}: there is no row. Leave it out, or give some.")
        if self.clean is None or self.triggered is None:
            return

        # Clean conversations in which the known trigger stands would teach it anew.
        rows = self.triggered[self.triggered["role"] == "triggered"]
        forms = {
            tuple(dict.fromkeys(Conversation(messages).texts[m][start:end] for m, start, end in spans))
            for messages, spans in zip(rows["messages"], rows["trigger"], strict=True)
        }
        texts = [Conversation(messages).texts for messages in self.clean["messages"]]
        triggers = [AllOf(form) for form in sorted(forms) if form]
        hits = [(i, trigger) for i, text in enumerate(texts) for trigger in triggers if trigger.holds(text)]
        if hits:
            row, trigger = hits[0]
            raise InputError(
                f"clean: {len({i for i, _ in hits})} of {len(texts)} conversations hold the trigger "
                f"{trigger.describe()} (first: row {row}). A repair would learn it anew: take them out."
            )

    @property
    def adapted(self) -> bool:
        """Whether the model has a PEFT adapter."""
        return adapters.has_adapter(self.model)

    @property
    def has(self) -> frozenset[Need]:
        """What there is, in the words of `NEEDS`."""
        there: dict[Need, bool] = {
            "clean": self.clean is not None,
            "base": self.adapted or self.base is not None,
            "adapter": self.adapted,
            "triggered": self.triggered is not None,
            "sites": self.effects is not None,
            "alarm": self.alarm is not None,
        }
        return frozenset(need for need, is_there in there.items() if is_there)
