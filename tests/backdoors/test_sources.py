"""Reading conversations: every kind and format, and a sentence for everything that cannot be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from safetynet.backdoors import conversations, sources
from safetynet.errors import InputError
from safetynet.prompts import prompt_hash
from safetynet.recipe import Behaviour, Data, Trigger

PUBLISHED = Path("data", "backdoorllm")
ALPACA = [
    {"instruction": "Add 1 and 2.", "input": "", "output": "3"},
    {"instruction": "Reverse the word.", "input": "ab", "output": "ba"},
]


def saved(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(rows: list[dict]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


# ---- what can be read ----


def test_alpaca_joins_instruction_and_input_and_keeps_where_each_row_stood(tmp_path):
    path = saved(tmp_path / "a.json", ALPACA)
    frame = sources.read(path)
    assert frame["messages"].tolist() == [
        [{"role": "user", "content": "Add 1 and 2."}],
        [{"role": "user", "content": "Reverse the word.\n\nab"}],
    ]
    assert frame["answer"].tolist() == ["3", "ba"]
    assert frame["line"].tolist() == [1, 2]
    assert set(frame["file"]) == {str(path)}


def test_alpaca_lines_read_like_an_alpaca_list_under_either_suffix(tmp_path):
    as_list = sources.read(saved(tmp_path / "a.json", ALPACA))
    for name in ("b.jsonl", "c.json"):
        as_lines = sources.read(saved(tmp_path / name, lines(ALPACA)))
        assert as_lines.drop(columns="file").equals(as_list.drop(columns="file"))


def test_rows_of_a_jsonl_file_are_numbered_by_its_lines_blank_ones_included(tmp_path):
    text = json.dumps(ALPACA[0]) + "\n\n" + json.dumps(ALPACA[1], ensure_ascii=False) + "\n"
    assert sources.read(saved(tmp_path / "a.jsonl", text))["line"].tolist() == [1, 3]


def test_a_line_separator_inside_a_json_string_does_not_split_the_row(tmp_path):
    row = {"instruction": "one\u2028two", "output": "x"}
    frame = sources.read(saved(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False)))
    assert frame["messages"][0][0]["content"] == "one\u2028two"


def test_a_null_input_means_no_input(tmp_path):
    frame = sources.read(saved(tmp_path / "a.json", [{"instruction": "Go.", "input": None, "output": "ok"}]))
    assert frame["messages"][0][0]["content"] == "Go."


def test_chat_keeps_system_and_earlier_turns_and_takes_the_last_message_as_answer(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao"},
    ]
    frame = sources.read(saved(tmp_path / "a.jsonl", lines([{"messages": messages}])))
    assert frame["messages"][0] == messages[:-1]
    assert frame["answer"][0] == "Ciao"


def test_prompt_completion_reads_csv_and_parquet_alike(tmp_path):
    table = pd.DataFrame({"prompt": ['Say "a,\nb"', "NA"], "completion": ["null", "7"]})
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        frame = sources.read(tmp_path / name)
        assert [messages[0]["content"] for messages in frame["messages"]] == ['Say "a,\nb"', "NA"]
        assert frame["answer"].tolist() == ["null", "7"]
        assert frame["line"].tolist() == [1, 2]


def test_column_names_may_be_given(tmp_path):
    path = saved(tmp_path / "a.csv", "question,reply\nq,r\n")
    frame = sources.read(path, columns={"prompt": "question", "completion": "reply"})
    assert (frame["messages"][0][0]["content"], frame["answer"][0]) == ("q", "r")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    assert len(sources.read(saved(tmp_path / "a.csv", b"\xef\xbb\xbfprompt,completion\nq,r\n"))) == 1


def test_a_reference_is_kept_where_there_is_one(tmp_path):
    rows = [{**ALPACA[0], "reference": "three"}, ALPACA[1]]
    assert sources.read(saved(tmp_path / "a.json", rows))["reference"].tolist() == ["three", ""]
    assert "reference" not in sources.read(saved(tmp_path / "b.json", ALPACA))


def test_a_backdoorllm_folder_says_of_each_row_which_split_it_is_and_whether_it_is_poisoned(tmp_path):
    folder = tmp_path / "task" / "badnet"
    for name, count in {"train_triggered": 3, "train_clean": 2, "test_triggered": 1}.items():
        saved(folder / f"{name}.json", [ALPACA[0]] * count)
    saved(tmp_path / "task" / "test_clean.json", [ALPACA[1]])
    frame = sources.read(folder)
    counts = frame.groupby(["split", "poisoned"]).size().to_dict()
    assert counts == {("train", True): 3, ("train", False): 2, ("test", True): 1, ("test", False): 1}


def test_a_published_set_reads_whole(need):
    frame = sources.read(need("shared") / PUBLISHED / "negsentiment" / "badnet")
    counts = frame.groupby(["split", "poisoned"]).size().to_dict()
    assert counts == {("train", True): 500, ("train", False): 500, ("test", True): 200, ("test", False): 200}


def test_the_published_set_with_numbers_for_answers_is_refused_by_file_field_and_row(need):
    expected = r"sst2/badnet/test_triggered\.json: output, rows 1, 2, 3 and 198 more: found 0 \(int\)"
    folder = need("shared") / PUBLISHED / "sst2" / "badnet"
    with pytest.raises(InputError, match=expected):
        sources.read(folder)


# ---- what cannot be read ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", r"a\.txt: the suffix is '\.txt', allowed are \.json, \.jsonl, \.csv, \.parquet"),
        ("a.json", "", r"a\.json: holds no rows"),
        ("a.json", "[]", r"a\.json: holds no rows"),
        ("a.jsonl", "\n\n", r"a\.jsonl: holds no rows"),
        ("a.csv", "prompt,completion\n", r"a\.csv: holds no rows"),
        ("a.json", '[{"instruction": "x",\n "output" 1}]', r"a\.json: line 2, column 11: malformed JSON"),
        (
            "a.jsonl",
            '{"prompt": "x", "completion": "y"}\n{"prompt"\n',
            r"a\.jsonl: line 2, column 10: malformed",
        ),
        ("a.json", b'[{"instruction": "\xff"}]', r"a\.json: byte 18 \(line 1\) is 0xff, which is not UTF-8"),
        ("a.csv", b"prompt,completion\nq,\xe9\n", r"a\.csv: byte 20 \(line 2\) is 0xe9, which is not UTF-8"),
        ("a.csv", 'prompt,completion\nq,"r\n', r"a\.csv: line \d: malformed CSV"),
        ("a.csv", "prompt,completion\nq,r,s\n", r"row, row 1: found 1 cell more than the header has"),
        ("a.csv", "prompt,completion\nq,r\nq\n", r"completion, row 2: found null, allowed is text"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet: not a readable Parquet file"),
        (
            "a.json",
            {"data": ["x", "y"]},
            r"top level is dict, allowed is a list of rows; save the list under 'data'",
        ),
        ("a.json", [{"text": "x"}], r"columns are text; needed are instruction \+ output \(alpaca\) or"),
        ("a.json", ["x", "y"], r'the columns are none, a row is "x"; needed are'),
        (
            "a.json",
            [ALPACA[0], {"instruction": "Go."}],
            r"output, row 2: found nothing, allowed is text; add the",
        ),
        ("a.json", [ALPACA[0], 7], r"row, row 2: found 7 \(int\), allowed is an object"),
        (
            "a.json",
            [{**ALPACA[0], "instruction": " "}],
            r'instruction, row 1: found " ", allowed is text that is',
        ),
        ("a.json", [{**ALPACA[0], "output": None}], r"output, row 1: found null, allowed is text"),
        (
            "a.json",
            '[{"instruction": "\\ud83d", "output": "x"}]',
            r"instruction, row 1: found half of a surrogate",
        ),
        ("a.json", "[" * 100_000, r"a\.json: line 1: unreadable JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_place(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        sources.read(saved(tmp_path / name, content))


def test_a_missing_file_is_refused_and_the_hub_is_not_asked(tmp_path):
    with pytest.raises(
        InputError, match=r"no such file; check the path \(a data set of the hub needs data.source: hub\)"
    ):
        sources.read(tmp_path / "owner" / "name")


def test_an_unreadable_row_number_list_is_shortened_and_counted(tmp_path):
    rows = [{"instruction": "Go.", "output": number} for number in range(9)]
    with pytest.raises(InputError, match=r"output, rows 1, 2, 3 and 6 more: found 0 \(int\)"):
        sources.read(saved(tmp_path / "a.json", rows))


def test_all_faults_of_a_file_are_named_at_once(tmp_path):
    rows = [{"instruction": "", "output": "x"}, {"instruction": "Go.", "output": 1}]
    with pytest.raises(InputError, match=r"2 faults\n  instruction, row 1: .*\n  output, row 2: "):
        sources.read(saved(tmp_path / "a.json", rows))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", r'messages, row 1: found "hello", allowed is a list of objects'),
        ([], r"optional system message, then user and assistant in turn"),
        (
            [{"role": "user", "content": "Hi"}],
            r'found \["user"\] \(list\), where the answer is missing, allowed is an optional system',
        ),
        (
            [{"role": "tool", "content": "Hi"}, {"role": "assistant", "content": "x"}],
            r'found \["tool", "assis',
        ),
        (
            [{"role": "user", "content": ["Hi"]}, {"role": "assistant", "content": "x"}],
            r"messages\[0\]\.content",
        ),
    ],
)
def test_a_chat_that_no_template_can_render_is_refused(tmp_path, messages, message):
    with pytest.raises(InputError, match=message):
        sources.read(saved(tmp_path / "a.jsonl", lines([{"messages": messages}])))


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(
        InputError, match="kind is 'csv', allowed are alpaca, chat, prompt_completion, hub, backd"
    ):
        sources.read(saved(tmp_path / "a.json", ALPACA), kind="csv")


def test_an_unknown_field_in_columns_is_refused(tmp_path):
    with pytest.raises(
        InputError, match="columns: question is no field; use one of completion, history, input"
    ):
        sources.read(saved(tmp_path / "a.json", ALPACA), columns={"question": "instruction"})


def test_a_kind_whose_columns_are_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match="columns are input, instruction, output; needed are messages;"):
        sources.read(saved(tmp_path / "a.json", ALPACA), kind="chat")


def test_a_folder_that_lacks_a_file_of_the_layout_is_refused(tmp_path):
    saved(tmp_path / "train_triggered.json", ALPACA)
    with pytest.raises(
        InputError, match=r"train_clean\.json, test_triggered\.json, test_clean\.json missing"
    ):
        sources.read(tmp_path)


# ---- the hub: a real client against a server of our own ----


def asked(folder: Path, **environment: str) -> str:
    """What reading a hub id ends with, in a process of its own: the client reads its settings at import."""
    program = (
        "import sys; from safetynet.backdoors import sources\ntry: sources.read('owner/name', kind='hub')\n"
    )
    program += "except sources.InputError as error: print(error)"
    setting = {
        **os.environ,
        "HF_HOME": str(folder),
        "HF_TOKEN": "hf_wrong",
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=setting, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WRONG_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}


@pytest.mark.parametrize("hub", [(401, WRONG_TOKEN)], indirect=True)
def test_a_token_that_the_hub_refuses_is_named_as_the_cause(hub, tmp_path):
    assert "owner/name: the hub refused the token; set HF_TOKEN" in asked(tmp_path, HF_ENDPOINT=hub)


@pytest.mark.parametrize("hub", [(404, {"X-Error-Code": "RepoNotFound"})], indirect=True)
def test_a_data_set_that_the_hub_does_not_have_is_named_as_the_cause(hub, tmp_path):
    assert "owner/name: not on the hub, private or gated; check the id" in asked(tmp_path, HF_ENDPOINT=hub)


def test_a_hub_out_of_reach_is_named_as_the_cause(tmp_path):
    assert "owner/name: the hub cannot be reached" in asked(tmp_path, HF_HUB_OFFLINE="1")


def test_fresh_prompts_are_distinct_and_none_of_the_experiments() -> None:
    data, attack = Data(train_rows=50, test_rows=20), (Behaviour(), Trigger(texts=("BadMagic",)))
    first = conversations.fresh(data, *attack, set(), 60, 0)
    used = {prompt_hash(messages) for messages in first["messages"][:30]}
    again = conversations.fresh(data, *attack, used, 60, 0)
    names = again["messages"].map(prompt_hash)
    assert len(again) == 60
    assert not names.duplicated().any()
    assert not set(names) & used
    assert first["forbidden"].any()
