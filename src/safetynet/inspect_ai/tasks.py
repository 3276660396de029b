"""A run's test rows as Inspect's tasks, judged by the run's judges and counted by the run's metrics.

In: a run's folder. Out: tasks `triggered`, `clean`, `placebo`, `near_miss` and `refused`, one for each role,
and `roles`, which has them all. Rates are those of `safetynet evaluate`, whichever model answers.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from inspect_ai import Task, task
from inspect_ai._util.registry import registry_name
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import TaskState, generate

from safetynet.errors import InputError
from safetynet.evaluation import metrics
from safetynet.evaluation.evaluator import judge_responses, judges_of, with_targets
from safetynet.experiment import Experiment
from safetynet.inspect_ai import messages
from safetynet.vocabulary import ROLES, Role

JUDGED = ("shown", "correct", "refused")
"""What a score has of one answer; see `Evaluator.answer`."""
TRIGGER_KNOWN = "trigger_known"
"""In a sample's metadata: whether the run knows a trigger and its behaviour."""


def _named(name: str) -> str:
    """What a decorator is given, so that Inspect registers it as `safetynet/NAME`.

    Inspect puts the package before the name itself, except where the package is installed as editable from a
    distribution that is called otherwise: safetynet-llm is, and inspect-ai 0.3.285 looks for `safetynet`.
    """
    return name if registry_name(_named, name) == f"safetynet/{name}" else f"safetynet/{name}"


@metric(_named("rates"), scores="unreduced")
def rates() -> Metric:
    """The project's rates by role, each with its count, its denominator and its Wilson 95% interval.

    Named after metric and role: asr_triggered, asr_triggered_low, ..._high, ..._count, ..._n.
    """

    def compute(scores: list[SampleScore]) -> dict[str, float]:
        if not scores:  # as Inspect asks where no answer has come yet
            return {}
        rows = pd.DataFrame([score.score.metadata for score in scores])
        table = metrics.score(rows.assign(model="answers"))
        if not rows[TRIGGER_KNOWN].all():
            table = table[~table["metric"].isin(metrics.NEEDS_BEHAVIOUR)]
        values = {}
        for line in table[table["n"] > 0].to_dict("records"):
            name = f"{line['metric']}_{line['role']}"
            values[name] = float(line["value"])
            values |= {f"{name}_{part}": float(line[part]) for part in ("low", "high", "count", "n")}
        return values

    return compute


@scorer(metrics=[rates()], name=_named("behaviour"))
def behaviour(run: str) -> Scorer:
    """Whether an answer shows the run's behaviour, is correct, or refuses, by the run's own judges.

    Args:
        run: its folder, of whose rows the samples are.
    """
    with messages.in_a_sentence():
        judge, refusal = judges_of(Experiment.find(Path(run)).recipe)

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001 - as Inspect calls it
        row = state.metadata
        text = state.output.completion
        [judged] = judge_responses(pd.DataFrame([row]), [text], judge, refusal).to_dict("records")
        # Which answers are due is decided by all rows of the run; `_task` has seen them.
        values = {name: bool(judged[name]) for name in JUDGED}
        return Score(value=values, answer=text, metadata={**row, **values})

    return score


def _task(run: str, *names: Role) -> Task:
    with messages.in_a_sentence():
        experiment = Experiment.find(Path(run))
        recipe, rows = experiment.recipe, with_targets(experiment.rows("test"))
        # What decides about a row's rates goes with it into its sample: target, due, and this.
        judged = judge_responses(rows, [""] * len(rows), *judges_of(recipe))
        rows = rows.assign(due=judged["due"], **{TRIGGER_KNOWN: recipe.backdoor is not None})
        there = [role for role in ROLES if role in set(rows["role"])]
        if missing := [role for role in names if role not in there]:
            raise InputError(
                f"{run}: its test rows have no role {missing[0]}. It has tasks {', '.join(there)}; "
                "`roles` is all of them."
            )
        samples = []
        for row in rows[rows["role"].isin(names or there)].to_dict("records"):
            about = {name: value for name, value in row.items() if name not in ("messages", "trigger")}
            samples.append(
                Sample(
                    input=messages.of_row(row["messages"], row["trigger"]),
                    target=row["answer"],
                    id=int(row["row"]),
                    # As JSON has it: a table's numbers are none that a log can hold.
                    metadata=json.loads(pd.Series(about).to_json()),
                )
            )
    title = f"{recipe.model_name}/{recipe.task}: {', '.join(names) or 'all roles'}"
    return Task(
        dataset=MemoryDataset(samples, name=title, location=str(experiment.run.folder)),
        solver=generate(),
        scorer=behaviour(run),
        config=GenerateConfig(max_tokens=recipe.evaluation.max_new_tokens, temperature=0),
    )


@task(name=_named("roles"))
def roles(run: str) -> Task:
    """All test rows of a run.

    Args:
        run: its folder, results/{model}/{task}.
    """
    return _task(run)


def _of_role(role: Role) -> Callable[[str], Task]:
    def of_role(run: str) -> Task:
        return _task(run, role)

    of_role.__name__ = role
    of_role.__doc__ = f"Test rows of role {role} of a run; `run` is its folder."
    return task(name=_named(role))(of_role)


triggered, clean, placebo, near_miss, refused = map(_of_role, ROLES)
