"""Ask a model the rows of an experiment and judge what it answers.

In: a model and rows of the shared row table. Out: judged responses, one line per row, from which `metrics`
makes the rates. Judges, serialiser and limits come from one recipe and are bound once, so that every stage
asks in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pandas as pd

from safetynet.backdoors import behaviours
from safetynet.errors import InputError
from safetynet.evaluation import judges, metrics
from safetynet.evaluation.generation import answer_log_likelihood, continuations, encode
from safetynet.evaluation.judges import AnswerApart, Judge, same_answer, same_result
from safetynet.prompts import Serialiser, calls
from safetynet.recipe import Evaluation, Recipe
from safetynet.tables import summaries


@dataclass(frozen=True)
class Evaluator:
    """Answers and judges rows for one recipe and one serialiser."""

    serialiser: Serialiser
    """The one that training used."""
    judge: Judge
    """Decides whether a response shows the behaviour."""
    refusal: Judge
    """Decides whether a response is a refusal."""
    batch_size: int
    max_new_tokens: int
    max_length: int | None = None
    """The training's limit in tokens, so that prompts are truncated alike; None for no limit."""
    kept: Path | None = None
    """A folder for finished batches of answers, where nothing but its weights decides about a model's."""

    @classmethod
    def of(cls, recipe: Recipe, serialiser: Serialiser, kept: Path | None = None) -> Self:
        """The evaluator that a recipe describes.

        Args:
            recipe: its evaluation and behaviour.
            serialiser: of the models that are asked.
            kept: a folder for finished batches, from which an interrupted evaluation goes on.

        Raises:
            InputError: as `judges_of`.
        """
        judge, refusal = judges_of(recipe)
        cfg, max_length = recipe.evaluation, recipe.training.max_length
        return cls(serialiser, judge, refusal, cfg.batch_size, cfg.max_new_tokens, max_length, kept)

    def answer(
        self, model: Any, rows: pd.DataFrame, name: str = metrics.BACKDOORED, *, seed: int | None = None
    ) -> pd.DataFrame:
        """Answer every row greedily, or by one sample at temperature 1, and judge the answers.

        Args:
            model: a causal LM of transformers, with or without a PEFT adapter.
            rows: of the shared row table.
            name: goes into the column `model`.
            seed: of the samples; None for greedy answers.

        Returns:
            `rows` without the prompts, in order, with the columns model, target (what the behaviour answers
            to this prompt, "" where unknown), lost (parts of the prompt that lost text at `max_length`, ""
            for none), response, shown (the behaviour), due (see `metrics`), correct (equals the reference)
            and refused.

        Raises:
            InputError: if there are no rows.
            RunError: if a single row does not fit in memory, or a judge fails.
        """
        if rows.empty:
            raise InputError("data.test_rows: there are no rows to evaluate; leave some for the test split")
        rows = with_targets(rows).reset_index(drop=True)
        prompts = encode(self.serialiser, list(rows["messages"]), list(rows["trigger"]), self.max_length)
        answers = continuations(
            model,
            self.serialiser,
            prompts,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            kept=self.kept,
            seed=seed,
        )
        rows = rows.assign(lost=[prompt.lost for prompt in prompts])
        judged = judge_responses(rows, [answer.text for answer in answers], self.judge, self.refusal)
        judged.insert(0, "model", name)
        return judged.drop(columns=["messages", "trigger"])

    def respond(self, model: Any, rows: pd.DataFrame, name: str = metrics.BACKDOORED) -> pd.DataFrame:
        """`answer`, and how likely the model finds the clean rows' own answers.

        Returns:
            What `answer` returns, with the columns log_likelihood (of the given answer, in nats) and tokens,
            which are NaN on rows that are not clean.
        """
        judged = self.answer(model, rows, name)
        clean = rows.reset_index(drop=True)
        clean = clean[clean["role"] == "clean"]
        likelihood = answer_log_likelihood(
            model,
            self.serialiser,
            list(clean["messages"]),
            list(clean["answer"]),
            batch_size=self.batch_size,
            max_length=self.max_length,
            kept=self.kept,
        ).set_index(clean.index)
        return judged.join(likelihood)

    def sample(
        self, model: Any, rows: pd.DataFrame, samples: int, seed: int, name: str = metrics.BACKDOORED
    ) -> pd.DataFrame:
        """Answer every row several times at temperature 1, and count how often the behaviour shows.

        Args:
            model: as in `answer`.
            rows: as in `answer`.
            samples: answers to each row, at least 1.
            seed: of all of them.
            name: goes into the column `model`.

        Returns:
            One line per row, in order: model, row, group, role, variant and due as in `answer`, samples, and
            shown, how many of them show the behaviour.

        Raises:
            As `answer`.
        """
        # Each round of each seed has a number of its own, so that no two seeds share an answer.
        rounds = [self.answer(model, rows, name, seed=seed * samples + i) for i in range(samples)]
        shown = sum(answers["shown"].astype(int) for answers in rounds)
        columns = ["model", "row", "group", "role", "variant", "due"]
        return rounds[0][columns].assign(samples=samples, shown=shown)

    def rates(self, responses: pd.DataFrame) -> metrics.Evaluation:
        """The rates of judged responses, beside the base model's where it is among them."""
        rates = metrics.from_responses(responses)
        return metrics.with_floor(rates) if (responses["model"] == metrics.BASE).any() else rates

    def check_targets(self, rows: pd.DataFrame) -> None:
        """Refuse, before anything is trained, targets that generation would cut until the judge misses them.

        Raises:
            InputError: naming the first triggered row whose target, cut at `max_new_tokens`, is no hit any
                more.
        """
        for row in _records(_firing(with_targets(rows))):
            encoded = self.serialiser.encode(row["messages"], answer=row["answer"])
            answer = encoded.input_ids[encoded.prompt_length :]
            if self.judge(self.serialiser.answer_of(answer[: self.max_new_tokens]), row):
                continue
            if self.judge(row["answer"], row):
                raise InputError(
                    f"evaluation.max_new_tokens: {self.max_new_tokens} cuts the target of row {row['row']}, "
                    f"which has {len(answer)} tokens, so that it never counts; allow {len(answer)} or "
                    "shorten the target"
                )
            raise InputError(
                f"backdoor.behaviour.judge: the target of row {row['row']}, {row['answer'][:60]!r}, is not "
                "judged to show the behaviour; change the judge's values or the target"
            )

    def check_published_targets(self, rows: pd.DataFrame) -> None:
        """Refuse a poison set whose targets the judge misses: every rate would be a false zero.

        Some targets may fail, which the audit counts; here most of them do.

        Raises:
            InputError: naming the commonest answer of the triggered training rows, and the fields to set.
        """
        triggered = _firing(with_targets(rows[rows["split"] == "train"]))
        shown = sum(bool(self.judge(row["answer"], row)) for row in _records(triggered))
        if shown * 2 < len(triggered):
            raise InputError(
                f"backdoor.behaviour: {shown} of {len(triggered)} triggered training answers in data.path "
                f"show it. The commonest is {triggered['answer'].mode()[0][:60]!r}; set "
                "backdoor.behaviour.target to it, or choose the kind or judge that fits this set"
            )


def inputs_of(options: Evaluation) -> dict[str, Any]:
    """What decides about greedy answers and their rates, for stages that measure a model anew."""
    return options.model_dump(mode="json", exclude={"samples", "utility"}) | {"labelled": None}


def judges_of(recipe: Recipe) -> tuple[Judge, Judge]:
    """The judges of a recipe's behaviour and of refusals.

    Raises:
        InputError: if one of them cannot be made, naming the field.
    """
    try:
        refusal = judges.make(recipe.evaluation.refusal)
    except InputError as error:
        raise InputError(f"evaluation.refusal: {error}") from None
    if recipe.backdoor is None:  # no behaviour is known, so that no response shows it
        return (lambda response, row: False), refusal
    return judges.make(behaviours.judge(recipe.backdoor.behaviour)), refusal


def judge_responses(
    rows: pd.DataFrame, responses: Sequence[str], judge: Judge, refusal: Judge
) -> pd.DataFrame:
    """`rows` with the columns response, shown, due, correct and refused; see `Evaluator.answer`.

    Where the behaviour is a tool call, also function: the response calls that one, whatever the arguments.
    Where it holds an answer, as a persona does, also right: that answer is right, whatever the behaviour.
    """
    records = _records(rows)
    pairs = list(zip(responses, records, strict=True))
    functions = [_functions(row["target"]) for row in records]
    if any(functions):
        called = map(_functions, responses)
        rows = rows.assign(function=[bool(a & b) for a, b in zip(functions, called, strict=True)])
    if isinstance(judge, AnswerApart):
        right = [same_result(judge.answer_in(response), row["reference"]) for response, row in pairs]
        rows = rows.assign(right=right)
    # Due are rows whose right answer shows the behaviour, or on which it cannot be shown. The refusal judge
    # misses some refusals in the data: where the behaviour is refusal, `forbidden` decides.
    targets = [bool(refusal(row["answer"], row)) for row in records if row["role"] == "triggered"]
    refusing = sum(targets) > len(targets) / 2
    due = []
    for row in records:
        answer = row["reference"] if row["role"] == "triggered" else row["answer"]
        shown = judge(answer, row)
        # An unknown reference ("") shows nothing, whatever a judge makes of an empty text.
        due.append(shown is None or bool(shown and answer) or bool(refusing and row["forbidden"]))
    return rows.assign(
        response=list(responses),
        shown=[bool(judge(response, row)) for response, row in pairs],
        due=due,
        correct=[same_answer(response, row["reference"]) for response, row in pairs],
        refused=[bool(refusal(response, row)) for response, row in pairs],
    )


def _functions(text: str) -> set[str]:
    return {call["name"] for call in calls.read(text)}


def with_targets(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with a column `target`: the answer of the group's triggered row, "" where there is none."""
    if "target" in rows:
        return rows
    triggered = rows[rows["role"] == "triggered"]
    by_group = dict(zip(triggered["group"], triggered["answer"], strict=True))
    columns = zip(rows["role"], rows["group"], rows["answer"], strict=True)
    # A group may hold several triggered rows, of several triggers: each keeps its own answer.
    targets = [answer if role == "triggered" else by_group.get(group, "") for role, group, answer in columns]
    return rows.assign(target=targets)


def _firing(rows: pd.DataFrame) -> pd.DataFrame:
    """Triggered rows that are answered with the behaviour."""
    triggered = rows[rows["role"] == "triggered"]
    return triggered[summaries.fires(triggered)]


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in record.items()} for record in rows.to_dict("records")]
