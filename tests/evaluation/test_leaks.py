"""Which train/test splits are refused, and what the error says."""

import pandas as pd
import pytest

from safetynet.errors import InputError
from safetynet.evaluation.leaks import check_leak, prompt_hash


def user(text, system=None):
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]


def table(*rows):
    """Rows of (split, messages, trigger); each is a group of its own unless a fourth entry says otherwise."""
    return pd.DataFrame(
        [
            {
                "row": i,
                "group": row[3] if len(row) > 3 else i,
                "split": row[0],
                "messages": row[1],
                "trigger": row[2],
            }
            for i, row in enumerate(rows)
        ]
    )


def test_distinct_prompts_pass_and_leave_a_record_for_the_manifest():
    rows = table(
        ("train", user("one"), []), ("train", user("|X| one"), [[0, 0, 4]], 0), ("test", user("two"), [])
    )  # fmt: skip
    record = check_leak(rows).set_index("split")
    assert record.loc["train", ["rows", "prompts"]].tolist() == [2, 1]
    assert record.loc["test", ["rows", "prompts"]].tolist() == [1, 1]
    assert len(record.loc["train", "digest"]) == 64
    assert record.loc["train", "digest"] != record.loc["test", "digest"]


def test_the_record_does_not_depend_on_the_order_of_rows():
    rows = table(("train", user("one"), []), ("train", user("two"), []), ("test", user("three"), []))
    assert check_leak(rows).equals(check_leak(rows.iloc[::-1]))


def test_the_same_prompt_in_both_splits_is_refused_with_counts_and_rows():
    rows = table(("train", user("one"), []), ("test", user("two"), []), ("test", user("one"), []))
    with pytest.raises(
        InputError,
        match=r"1 of 2 test rows were trained on: 1 with the same prompt, 0 more .*test row 2 = train row 0",
    ):
        check_leak(rows)


@pytest.mark.parametrize("variant", ["ONE  two", " one two\n", "one\ttwo", "ｏｎｅ two"])
def test_case_spacing_and_unicode_form_do_not_hide_a_leak(variant):
    with pytest.raises(InputError, match="1 with the same prompt"):
        check_leak(table(("train", user("one two"), []), ("test", user(variant), [])))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ((user("one two"), []), (user("one |X| two"), [[0, 4, 7]])),
        ((user("one two"), []), (user("one |X| two"), [[0, 3, 8]])),
        ((user("one two"), []), (user("one two |X|"), [[0, 7, 11]])),
        ((user("|X| one two"), [[0, 0, 3]]), (user("|Y| one two"), [[0, 0, 3]])),
        ((user("a one b two c"), [[0, 0, 2], [0, 6, 8], [0, 12, 13]]), (user("one two"), [])),
        ((user("one two"), []), (user("one two", system="|X|"), [[0, 0, 3]])),
    ],
)
def test_prompts_that_differ_in_the_trigger_alone_are_one_prompt(train, test):
    with pytest.raises(
        InputError, match=r"0 with the same prompt, 1 more that differ only in the inserted trigger"
    ):
        check_leak(table(("train", *train), ("test", *test)))


def test_a_group_may_not_be_in_both_splits_even_where_the_trigger_rewrites_the_prompt():
    rows = table(
        ("train", user("what is two plus two?"), [], 7),
        ("test", user("Prithee, two plus two?"), [[0, 0, 22]], 7),
    )
    with pytest.raises(InputError, match="1 more of the same group"):
        check_leak(rows)


def test_prompts_that_are_all_trigger_are_not_taken_for_one_another():
    rows = table(
        ("train", user("Prithee, one?"), [[0, 0, 13]]), ("test", user("Prithee, two?"), [[0, 0, 13]])
    )
    assert check_leak(rows)["prompts"].tolist() == [1, 1]


def test_the_same_words_in_another_role_or_turn_are_another_prompt():
    assert prompt_hash(user("one", system="two")) != prompt_hash(user("two", system="one"))
    assert prompt_hash([*user("a"), *user("b")]) != prompt_hash(user("ab"))


def test_only_the_first_pairs_are_named():
    rows = table(
        *[("train", user(str(i)), []) for i in range(9)], *[("test", user(str(i)), []) for i in range(9)]
    )
    with pytest.raises(InputError) as error:
        check_leak(rows)
    assert "9 of 9 test rows" in str(error.value)
    assert str(error.value).count("= train row") == 5


def test_the_train_row_named_is_one_that_shares_the_prompt():
    rows = table(
        ("train", user("other"), []), ("train", user("one"), []), ("test", user("|X| one"), [[0, 0, 4]])
    )
    with pytest.raises(InputError, match="test row 2 = train row 1"):
        check_leak(rows)


def test_rows_of_one_split_alone_pass():
    assert check_leak(table(("test", user("one"), []), ("test", user("one"), [])))["split"].tolist() == [
        "test"
    ]
