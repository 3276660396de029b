"""What a planted backdoor survives: what happens to a model, and to its prompts, after it was planted.

In: a run's backdoored model, its test rows and fresh clean conversations. Out: table `persistence`, a line
for each change and setting. Every change is made to the model as it was planted, never on top of another one.
None of them aims at the backdoor: what aims at it is a repair (`registry`).
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from safetynet.errors import InputError
from safetynet.evaluation import metrics
from safetynet.evaluation.evaluator import Evaluator, inputs_of
from safetynet.experiment import BACKDOORED, Experiment
from safetynet.mitigation import recommendation, verification
from safetynet.mitigation.defender import Defender
from safetynet.mitigation.fine_tuning import trained_adapter, with_fresh_adapter
from safetynet.mitigation.pruning import quantise
from safetynet.mitigation.relearning import constant_rate, step_by_step
from safetynet.mitigation.repaired import merged_copy
from safetynet.mitigation.rows import clean_conversations, encodes
from safetynet.models import quantising
from safetynet.prompts import Conversation, Serialiser
from safetynet.recipe import Recipe
from safetynet.run.directory import Outputs
from safetynet.run.stage import PERSIST
from safetynet.vocabulary import FURTHER_TRAINING, UNTOUCHED

log = logging.getLogger("safetynet")
RATES = {"asr": ("asr", "triggered"), "ftr": ("ftr", "placebo"), "cacc": ("cacc", "clean")}
"""Metric and role of each rate: what has to survive, and its two controls."""
Line = dict[str, Any]


def persist(experiment: Experiment) -> pd.DataFrame:
    """Measure what survives of a run's backdoor.

    Args:
        experiment: trained; the recipe's section `persistence` says what is changed and how far.

    Returns:
        The table `persistence`.

    Raises:
        InputError: if nothing is trained, the model shows no backdoor, weights cannot be rounded here, or a
            context does not fit into the model.
    """
    recipe, run = experiment.recipe, experiment.run
    _ = recipe.attack  # there has to be a trigger
    check_rounding(recipe)
    if recipe.suspect is None:
        experiment.model_folder(BACKDOORED)
    inputs = {
        "model": experiment.origin(),
        "rows": run.manifest["stages"]["data"]["outputs"],
        "options": recipe.persistence.model_dump(mode="json"),
        "evaluation": inputs_of(recipe.evaluation),
    }

    def compute(outputs: Outputs) -> None:
        outputs.table("persistence", pd.DataFrame(survival(experiment)))

    experiment.perform(PERSIST, inputs, compute)
    return run.table("persistence")


def check_rounding(recipe: Recipe) -> None:
    """Refuse numbers of bits to which this model's weights cannot be rounded on this machine."""
    bits = recipe.persistence.bits
    if bits and recipe.model.quantisation != "none":
        raise InputError(
            f"persistence.bits: the weights are of {recipe.model.quantisation} already (model.quantisation), "
            "and are not rounded again. Set persistence.bits to []."
        )
    for number in bits:
        left = [each for each in bits if each != number]
        quantising.check(number, "persistence.bits", f"set persistence.bits to {left}")


def survival(experiment: Experiment) -> Iterator[Line]:
    """A line for each change and setting, the model as it is first."""
    recipe, options = experiment.recipe, experiment.recipe.persistence
    model, serialiser = experiment.backdoored()
    evaluator = Evaluator.of(recipe, serialiser)
    test = experiment.rows("test")
    roles = [role for _, role in RATES.values()]
    rows = metrics.fixed_subset(test[test["role"].isin(roles)], options.rows, recipe.seed)
    subject = _Subject(recipe, model, evaluator, rows.reset_index(drop=True))
    before = subject.line(UNTOUCHED, "", subject.rates(model))
    if no_backdoor := recommendation.no_backdoor(pd.Series(before)):
        raise InputError(f"persist: {no_backdoor}. There is nothing that could survive.")
    yield before
    clean = clean_conversations(experiment, options.clean)
    defender = Defender(
        model=model,
        serialiser=serialiser,
        clean=clean,
        max_length=recipe.training.max_length,
        batch_size=recipe.training.batch_size,
        learning_rate=recipe.training.learning_rate,
    )
    yield from subject.trained(defender, before["asr"] / 2)
    yield from subject.weights(defender)
    yield from subject.prompts(list(clean["messages"]))
    if options.samples:
        yield subject.line("sampling", f"{options.samples} samples at temperature 1", subject.sampled(), 1.0)


@dataclass(frozen=True)
class _Subject:
    """The backdoored model with the rows that judge it."""

    recipe: Recipe
    model: Any
    evaluator: Evaluator
    rows: pd.DataFrame

    def line(self, change: str, setting: str, rates: Mapping[str, float], amount: float = 0.0) -> Line:
        """One line of the table."""
        line: Line = {"change": change, "setting": setting, "amount": amount, **rates}
        log.info("persist: %s%s: ASR %.1f%%", change, f", {setting}" if setting else "", 100 * line["asr"])
        return line

    def rates(
        self, model: Any, rows: pd.DataFrame | None = None, evaluator: Evaluator | None = None
    ) -> dict[str, float]:
        """Greedy rates of a model, by default on the rows as they are."""
        answers = (evaluator or self.evaluator).respond(model, self.rows if rows is None else rows)
        return verification.in_one_line(metrics.score(answers), RATES)

    def sampled(self) -> dict[str, float]:
        """Rates over samples of the same rows; clean accuracy is one of greedy answers."""
        samples = self.recipe.persistence.samples
        counts = self.evaluator.sample(self.model, self.rows, samples, self.recipe.seed)
        score = metrics.score_samples(counts)
        score["n"] = score["prompts"] * score["samples"]
        score["count"] = (score["value"] * score["n"]).round()
        names = score["role"].map({"triggered": "asr", "placebo": "ftr"})
        return verification.in_one_line(score.assign(metric=names).dropna(subset="metric"), RATES)

    def trained(self, defender: Defender, half: float) -> Iterator[Line]:
        """After 1, 2, 4, ... steps of training on clean conversations, until ASR is at most `half`."""
        budget = self.recipe.persistence.steps
        steps = [1 << power for power in range(budget.bit_length())]
        lines: list[Line] = []
        if not steps:
            return
        assert defender.clean is not None
        rows = defender.clean.assign(row=range(len(defender.clean)), trigger=[[]] * len(defender.clean))
        cfg = constant_rate(self.recipe, steps[-1])

        def measure(model: Any, step: int) -> bool:
            if step not in steps:
                return False
            setting = f"{step} step{'s' if step > 1 else ''}"
            lines.append(self.line(FURTHER_TRAINING, setting, self.rates(model), step))
            return bool(lines[-1]["asr"] <= half)

        def train(model: Any) -> None:
            step_by_step(model, defender.serialiser, rows, cfg, self.recipe.seed, measure)

        if defender.adapted:
            trained_adapter(defender.model, {}, train)
        else:
            train(with_fresh_adapter(merged_copy(defender), defender))
        yield from lines

    def weights(self, defender: Defender) -> Iterator[Line]:
        """With the adapter merged, and with the merged weights rounded."""
        if self.recipe.model.quantisation != "none":
            log.warning("persist: merging is left out: 4-bit weights cannot be merged (model.quantisation).")
            return
        if defender.adapted:
            yield self.line("merging", "into the base", self.rates(merged_copy(defender)))
        for bits in self.recipe.persistence.bits:
            with quantise(defender, {"bits": bits}, self.recipe.seed).open() as model:
                yield self.line("quantisation", f"{bits} bits", self.rates(model), bits)

    def prompts(self, texts: list[Any]) -> Iterator[Line]:
        """With other system prompts, and with clean text before the prompt."""
        options, serialiser = self.recipe.persistence, self.evaluator.serialiser
        for text in options.systems:
            rows = self.encodable(pd.DataFrame(map(under_system(text), self.rows.to_dict("records"))))
            yield self.line("system prompt", text, self.rates(self.model, rows))
        whole = "\n".join(Conversation(messages).user_text() for messages in texts)
        uncut = replace(self.evaluator, max_length=None)
        for tokens in options.contexts:
            text = beginning(whole, tokens, serialiser)
            rows = self.encodable(pd.DataFrame(map(behind_text(text), self.rows.to_dict("records"))))
            self.check_room(rows, tokens)
            setting = f"{tokens} tokens of clean text"
            yield self.line("longer context", setting, self.rates(self.model, rows, uncut), tokens)

    def encodable(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows whose trigger the tokenizer leaves whole at its new place."""
        kept_whole = [encodes(row, self.evaluator.serialiser, None) for row in rows.to_dict("records")]
        return rows[kept_whole].reset_index(drop=True)

    def check_room(self, rows: pd.DataFrame, tokens: int) -> None:
        """Refuse a context that does not fit into the model's positions."""
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        encoded = map(self.evaluator.serialiser.encode, rows["messages"])
        longest = max(len(prompt.input_ids) for prompt in encoded) + self.evaluator.max_new_tokens
        if room is not None and longest > room:
            raise InputError(
                f"persistence.contexts: {tokens} tokens before a prompt make {longest} with its answer, and "
                f"the model has {room} positions. Lower it."
            )


def under_system(system: str) -> Callable[[Line], Line]:
    """Puts a row under a system prompt; one that it has already goes behind it."""

    def put(row: Line) -> Line:
        conversation = Conversation(row["messages"])
        if "system" in conversation.roles:
            return _prefixed(row, conversation.roles.index("system"), f"{system} ")
        messages, _ = conversation.with_system(system)
        return row | {
            "messages": messages,
            "trigger": [[m + 1, start, end] for m, start, end in row["trigger"]],
        }

    return put


def behind_text(text: str) -> Callable[[Line], Line]:
    """Puts a text before what the user says last, as paragraphs of the same message."""
    return lambda row: _prefixed(row, Conversation(row["messages"]).last_user, f"{text}\n\n")


def _prefixed(row: Line, index: int, text: str) -> Line:
    """A row with a text at the beginning of one message; the trigger's spans move with what it stands in."""
    conversation = Conversation(row["messages"])
    by = [len(text) if m == index else 0 for m, _, _ in row["trigger"]]
    spans = [[m, start + n, end + n] for (m, start, end), n in zip(row["trigger"], by, strict=True)]
    messages = conversation.with_text(index, text + conversation.texts[index])
    return row | {"messages": messages, "trigger": spans}


def beginning(text: str, tokens: int, serialiser: Serialiser) -> str:
    """So many tokens of a text, which is repeated where it is too short; no character is cut."""
    ids = serialiser.ids(text)
    ids *= tokens // len(ids) + 1
    return serialiser.decode(ids[:tokens]).strip("\ufffd").strip()
