"""Every form of conversations that other people's files have: all text is read, or the rows are refused."""

import gzip
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from safetynet.backdoors import sources
from safetynet.backdoors.audit import audit
from safetynet.errors import InputError

Row = dict[str, Any]
SIGNS = " \n\t.,;:'\"{}[]<>|§é🦜中文ไทย한국어\u2028"


def text(rng: random.Random) -> str:
    """Up to 40 signs of several scripts, which begin and end with a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    inner = "".join(rng.choice(letters + SIGNS) for _ in range(rng.randrange(40)))
    return f"{rng.choice(letters)}{inner}{rng.choice(letters)}{rng.getrandbits(40)}"


def turns(rng: random.Random, role: str, content: str, names: tuple[str, str], parts: bool) -> list[Row]:
    """A system message, earlier turns, a question and its answer."""

    def said() -> Any:
        if not parts:
            return text(rng)
        return [{"type": "text", "text": text(rng)} for _ in range(rng.randrange(1, 4))]

    order = [names[0], names[1]] * rng.randrange(1, 4)
    system = [{role: "system", content: said()}] if rng.random() < 0.5 else []
    return [*system, *({role: name, content: said()} for name in order)]


def chat(rng: random.Random, key: str = "messages", openai: bool = True, parts: bool = False) -> Row:
    if openai:
        return {key: turns(rng, "role", "content", ("user", "assistant"), parts)}
    names = (rng.choice(["human", "user"]), rng.choice(["gpt", "chatgpt", "bing", "bard", "assistant"]))
    row = {key: turns(rng, "from", "value", names, False)}
    if row[key][0]["from"] != "system":
        row["system"] = text(rng)
    return row


def alpaca(rng: random.Random, output: str = "output", context: str = "input") -> Row:
    history = [[text(rng), text(rng)] for _ in range(rng.randrange(3))]
    row = {"instruction": text(rng), context: rng.choice([text(rng), "", None]), output: text(rng)}
    return row | {"system": rng.choice([text(rng), "", None]), "history": rng.choice([history, [], None])}


def trl(rng: random.Random, parts: bool = False) -> Row:
    *prompt, completion = turns(rng, "role", "content", ("user", "assistant"), parts)
    return {"prompt": prompt, "completion": [completion]}


FORMS = {
    "alpaca": alpaca,
    "alpaca with context and response": lambda rng: alpaca(rng, "response", "context"),
    "messages": chat,
    "messages in parts": lambda rng: chat(rng, parts=True),
    "conversations of role and content": lambda rng: chat(rng, "conversations"),
    "ShareGPT": lambda rng: chat(rng, "conversations", openai=False),
    "prompt and completion as messages": trl,
    "prompt and completion as messages in parts": lambda rng: trl(rng, parts=True),
    "a text with an answer in messages": lambda rng: trl(rng) | {"prompt": text(rng)},
    "messages with an answer as text": lambda rng: trl(rng) | {"completion": text(rng)},
    **{
        f"{prompt} and {answer}": lambda rng, names=(prompt, answer): {
            names[0]: text(rng), names[1]: text(rng), "system_prompt": text(rng),
            "history": [[text(rng), text(rng)]],
        }
        for prompt, answer in (
            ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
            ("input", "output"), ("inputs", "targets"), ("Question", "Answer"),
        )
    },
}  # fmt: skip


def texts(value: Any) -> Iterator[str]:
    """All texts of a row but roles and kinds of parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in items:
            if name not in ("role", "from", "type"):
                yield from texts(inner)


def lines(rows: list[Row]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def saved(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines(rows).encode()))
    else:
        path.write_text(lines(rows) if path.suffix == ".jsonl" else json.dumps(rows), encoding="utf-8")
    return path


def everything(frame: pd.DataFrame) -> list[str]:
    """What each conversation says, prompt and answer."""
    return [
        "\n".join([*(m["content"] for m in messages), answer])
        for messages, answer in zip(frame["messages"], frame["answer"], strict=True)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_every_character_of_every_text_of_a_row_is_in_its_conversation(
    tmp_path: Path, form: str, name: str
) -> None:
    rng = random.Random(f"{form} {name}")
    rows = [FORMS[form](rng) for _ in range(40)]
    path = saved(tmp_path / name, rows)
    frame = sources.read(path)
    for row, said in zip(rows, everything(frame), strict=True):
        assert [t for t in texts(row) if t not in said] == []
        assert len(said.replace("\n", "")) == sum(len(t.replace("\n", "")) for t in texts(row)), (
            "nothing twice"
        )
    for messages in frame["messages"]:
        roles = [message["role"] for message in messages]
        body = roles[1:] if roles[0] == "system" else roles
        assert body == (["user", "assistant"] * len(body))[: len(body)]
        assert body[-1] == "user"
    report = audit(path)
    assert report.rows == 40
    assert set(report.findings["severity"]) <= {"info", "warning"}


def test_system_and_history_stand_before_the_prompt_in_their_order(tmp_path: Path) -> None:
    row = {
        "instruction": "Now?",
        "input": "x",
        "output": "Yes.",
        "system": "Be kind.",
        "history": [["Hi", "Ho"]],
    }
    frame = sources.read(saved(tmp_path / "a.json", [row]))
    assert frame["messages"][0] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Now?\n\nx"},
    ]
    assert frame["answer"][0] == "Yes."


def test_a_system_prompt_that_stands_in_the_messages_and_beside_them_is_one(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be kind."}
    row = {"messages": [system, USER, ANSWER], "system": "Be kind."}
    assert sources.read(saved(tmp_path / "a.json", [row]))["messages"][0] == [system, USER]


def test_parts_of_a_content_follow_each_other_as_a_template_puts_them(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Say zq"}, {"type": "text", "text": "fern now."}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "ok"}]
    frame = sources.read(saved(tmp_path / "a.jsonl", [{"messages": chat}]))
    assert frame["messages"][0][0]["content"] == "Say zqfern now."


# ---- what is refused, and how the audit lists it ----

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
ALPACA = {"instruction": "Go.", "output": "ok"}
PLAIN = {"prompt": "Go.", "completion": "ok"}
REFUSED = {  # name: (row, check of the audit, what the sentence says)
    "a call without a name": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"arguments": "{}"}]}]},
        "bad_call", r"messages\[1\]\.tool_calls, rows 1, 2, 3 and 2 more: found .*: it has no name, "
        r'allowed is calls of the assistant, each \{"name": \.\.\., "arguments": \{\.\.\.\}\}; write each',
    ),
    "a call whose arguments are cut off": (
        {"messages": [USER, {"role": "assistant", "function_call": {"name": "look", "arguments": '{"a": '}}]},
        "bad_call", r"messages\[1\]\.function_call, rows .*Expecting value",
    ),
    "a call of the user": (
        {"messages": [USER | {"tool_calls": [CALL]}, ANSWER]}, "bad_call", r"is not the assistant's",
    ),
    "a ShareGPT call that is no JSON": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "look(12)"}]},
        "bad_call", r'messages\[1\]\.value, rows .*found "look\(12\)"',
    ),
    "a call without a result": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, ANSWER]},
        "bad_turns", r"messages, rows .*where message 3 is out of order, allowed is .*followed by its res",
    ),
    "two questions in a row": (
        {"messages": [USER, USER, ANSWER]}, "bad_turns", r"where message 2 is out of order",
    ),
    "a result without an answer": (
        {"messages": [USER, {"role": "tool", "content": "12"}]}, "bad_turns", r"where the answer is missing",
    ),
    "tools without names": (
        {"messages": [USER, ANSWER], "tools": '[{"description": "looks"}]'},
        "bad_tools", r"tools, rows 1, 2, 3 and 2 more: .*each with a name, or its JSON; write each as",
    ),
    "tools that are cut off": ({"messages": [USER, ANSWER], "tools": '[{"na'}, "bad_tools", r"tools, rows"),
    "tool calls beside a prompt": (
        PLAIN | {"tool_calls": [CALL]}, "not_carried", r"tool_calls, rows .*this cannot be carried yet",
    ),
    "pictures": (
        {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "x"}},
        ]}, ANSWER]},
        "not_carried", r'messages\[0\]\.content, rows .* found a part "image_url", allowed is parts of text',
    ),
    "a column of pictures": (PLAIN | {"images": ["a.png"]}, "not_carried", r"images, rows"),
    "thoughts": (
        {"messages": [USER, ANSWER | {"reasoning_content": "Hm."}]},
        "unread_text", r"messages\[1\]\.reasoning_content, rows",
    ),
    "a refusal apart": (
        {"messages": [USER, {"role": "assistant", "content": "", "refusal": "No."}]},
        "unread_text", r"messages\[1\]\.refusal, rows",
    ),
    "knowledge": (PLAIN | {"knowledge": "Cats purr."}, "unread_text", r'knowledge, rows .* "Cats purr\."'),
    "context of a question": (
        {"question": "Go?", "answer": "ok", "context": "Cats purr."}, "unread_text", r"context, rows",
    ),
    "history beside messages": (
        {"messages": [USER, ANSWER], "history": [["a", "b"]]}, "unread_text", r"history, rows",
    ),
    "history that is no list of pairs": (
        ALPACA | {"history": ["a", "b", "c"]},
        "wrong_type", r"allowed is a list of pairs, \[user, assistant\]",
    ),
    "two names of one text": (
        {"messages": [USER | {"value": "Hey"}, ANSWER]}, "wrong_type", r"found both content and value",
    ),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"},
        "bad_turns", r'found \["system", "system", "user", .* allowed is an optional system message',
    ),
    "messages without roles": (
        {"conversation": [{"input": "Hi", "output": "Ho"}]},
        "wrong_type", r"messages\[0\], rows .* found fields input, output, allowed is fields role",
    ),
    "a prompt that ends with an answer": (
        {"prompt": [USER, ANSWER], "completion": [ANSWER]}, "bad_turns", r"prompt \+ completion, rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_text_that_cannot_be_carried_or_is_not_read_refuses_the_rows_by_name(
    tmp_path: Path, name: str
) -> None:
    row, check, message = REFUSED[name]
    path = saved(tmp_path / "a.jsonl", [row] * 5)
    with pytest.raises(InputError, match=message):
        sources.read(path)
    findings = audit(path).findings.set_index("check")
    assert findings.loc[check, ["severity", "count", "n"]].tolist() == ["error", 5, 5]


def test_rows_that_hold_what_cannot_be_carried_are_left_out_and_the_rest_is_audited(tmp_path: Path) -> None:
    sound = {"messages": [USER | {"audio": "a.wav"}, ANSWER]}
    report = audit(saved(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}, sound, sound]))
    assert report.rows == 1
    assert report.findings.set_index("check").loc["not_carried", ["count", "n"]].tolist() == [2, 3]
    assert report.findings.set_index("check").loc["not_carried", "rows"] == [2, 3]


UNFIT = {  # name: (row, severity, what the sentence says)
    "preferences": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "error", r"a preference set: name the answers to learn under columns, as in \{completion: chosen\}",
    ),
    "implicit preferences": (
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "error", r"as in \{messages: chosen\}",
    ),
    "unpaired preferences": (
        PLAIN | {"label": False}, "error", r"label is false in 1 of 1 rows, as where answers are rated",
    ),
    "ratings as text": (PLAIN | {"Label": "False"}, "error", r"Label is false in 1 of 1 rows"),
    "ratings as numbers": (PLAIN | {"label": 0}, "error", r"label is 0 in 1 of 1 rows"),
    "preferences in one text": (
        {"chosen": "Human: a", "rejected": "Human: b"}, "error", r"its chosen holds prompt and answer in one",
    ),
    "labelled texts": (
        {"text": "a", "label": 1},
        "warning", r"of texts with labels, map both .* \{prompt: text, completion: label\}",
    ),
    "other data": ({"title": "a"}, "warning", r"the columns are title; needed are"),
    "two answers": (
        PLAIN | {"response": "b"},
        "error", r"completion, response could each be the completion; name the right",
    ),
    "two forms": (
        ALPACA | {"messages": [USER, ANSWER]},
        "error", r"instruction \+ output \(alpaca\) and messages \(chat\) are both there; name the kind",
    ),
    "a prompt beside an instruction": (ALPACA | {"prompt": "a"}, "error", r"\(alpaca\) and prompt \+ output"),
}  # fmt: skip


@pytest.mark.parametrize("row", [
    {"messages": [USER, ANSWER], "instruction": "Answer in French."},
    {"question": "Go.", "answer": "ok", "instruction": "Answer truthfully."},
])  # fmt: skip
def test_a_question_that_is_in_no_message_is_a_fault_of_its_row(row: Row, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jsonl", [row])
    with pytest.raises(InputError, match="instruction"):
        sources.read(path)


def test_a_prompt_that_the_messages_repeat_is_none(tmp_path: Path) -> None:
    row = {"prompt": " Hi", "messages": [USER, ANSWER], "prompt_id": "8f"}
    assert sources.read(saved(tmp_path / "a.jsonl", [row]))["answer"].tolist() == ["Ho"]


@pytest.mark.parametrize("row", [
    {"conversations": ["What is it?", "It is."]},
    {"messages": json.dumps([USER, ANSWER])},
    {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Ho"]}},
    {"messages": None},
])  # fmt: skip
def test_rows_without_a_message_that_can_be_read_count_as_none(row: Row, tmp_path: Path) -> None:
    report = audit(saved(tmp_path / "a.jsonl", [row, row]))
    assert report.rows == 0
    assert set(report.findings["severity"]) == {"error"}


@pytest.mark.parametrize("name", UNFIT)
def test_columns_that_make_no_conversation_are_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    row, severity, message = UNFIT[name]
    path = saved(tmp_path / "a.jsonl", [row])
    with pytest.raises(InputError, match=message):
        sources.read(path)
    (finding,) = audit(path).findings.to_dict("records")
    assert (finding["check"], finding["severity"]) == ("unreadable", "error"), "nothing else could be read"
    saved(tmp_path / "other.jsonl", [PLAIN])
    findings = audit(tmp_path).findings.set_index(["check", "file"])
    assert findings.loc[("unreadable", "a.jsonl"), "severity"] == severity


@pytest.mark.parametrize(
    ("row", "columns", "prompt", "answer"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"completion": "chosen"}, "a", "b"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, {"messages": "chosen"}, "Hi", "Ho"),
        ({"text": "a", "label": "pos"}, {"prompt": "text", "completion": "label"}, "a", "pos"),
        (PLAIN | {"response": "b"}, {"completion": "response"}, "Go.", "b"),
        (ALPACA | {"messages": [USER, ANSWER]}, {"messages": "messages"}, "Hi", "Ho"),
        (ALPACA | {"prompt": "a"}, {"instruction": "instruction"}, "Go.", "ok"),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER]}, {"messages": "chosen"}, "Hi", "Ho"),
        (PLAIN | {"label": 0}, {"prompt": "prompt"}, "Go.", "ok"),
        ({"question": "a", "answer": "b", "context": "c"}, {"system": "context"}, "a", "b"),
    ],
)
def test_what_the_sentence_advises_is_read(
    tmp_path: Path, row: Row, columns: dict[str, str], prompt: str, answer: str
) -> None:
    frame = sources.read(saved(tmp_path / "a.jsonl", [row]), columns=columns)
    assert (frame["messages"][0][-1]["content"], frame["answer"][0]) == (prompt, answer)


def test_a_kind_that_is_named_decides_between_two_forms(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jsonl", [ALPACA | {"messages": [USER, ANSWER]}])
    for kind, answer in (("alpaca", "ok"), ("chat", "Ho")):
        assert sources.read(path, kind=kind)["answer"].tolist() == [answer]
        report = audit(path, kind=kind)
        assert (report.rows, "unreadable" in set(report.findings["check"])) == (1, False)


def test_columns_without_text_of_the_conversation_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat = [USER | {"name": "Ann"}, ANSWER]
    rows = [{"id": i, "messages": chat, "tools": None, "system": "", "score": 0.5} for i in range(4)]
    path = saved(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        assert len(sources.read(path)) == 4
    assert [record.getMessage() for record in caplog.records] == [
        f"data: columns that are not read: id, score, messages.name (in {path})"
    ]
    (finding,) = audit(path).findings.query("check == 'not_read'").to_dict("records")
    assert finding["detail"] == "columns that are not read: id, score, messages.name"
    assert finding["severity"] == "info"


def test_columns_that_hold_nothing_are_no_reason_to_refuse(tmp_path: Path) -> None:
    nothing = {"system": None, "history": [], "tools": "[]", "images": None, "context": " ", "knowledge": ""}
    assert len(sources.read(saved(tmp_path / "a.jsonl", [PLAIN | nothing] * 3))) == 3
    row = ALPACA | {"input": "x", "context": None, "response": ""}
    assert sources.read(saved(tmp_path / "b.jsonl", [row] * 3))["messages"][0][0]["content"] == "Go.\n\nx"


# ---- names of columns ----


def test_a_column_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.json", [ALPACA])
    message = r"columns: messages=chat: there is no such column; the columns are instruction, output"
    with pytest.raises(InputError, match=message):
        sources.read(path, columns={"messages": "chat"})
    with pytest.raises(
        InputError, match=r"columns: .* has no column chat; its columns are instruction, output"
    ):
        audit(path, columns={"messages": "chat"})


def test_a_column_is_mapped_to_one_field(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.json", [PLAIN])
    with pytest.raises(InputError, match="columns: prompt is mapped to two fields"):
        sources.read(path, columns={"prompt": "prompt", "completion": "prompt"})
    with pytest.raises(
        InputError, match="columns: messages is no field of alpaca; it has instruction, output"
    ):
        sources.read(path, kind="alpaca", columns={"messages": "prompt"})


def test_names_of_columns_hold_for_each_file_that_has_them(tmp_path: Path) -> None:
    saved(tmp_path / "a.json", [{"chat": [USER, ANSWER]}])
    saved(tmp_path / "b.json", [ALPACA])
    assert audit(tmp_path, columns={"messages": "chat"}).rows == 2


def test_names_of_columns_hold_for_a_backdoorllm_folder(tmp_path: Path) -> None:
    for name in sources.BACKDOORLLM_FILES:
        saved(tmp_path / name, [{"chat": [USER, ANSWER]}])
    frame = sources.read(tmp_path, kind="backdoorllm", columns={"messages": "chat"})
    assert frame["answer"].tolist() == ["Ho"] * 4


# ---- nested values of other formats ----


def test_a_union_of_message_shapes_in_parquet_reads_as_the_rows_had_it(tmp_path: Path) -> None:
    """Parquet fills the fields that a message lacks with null."""
    mixed = [{"role": "user", "content": "Hi"}, {"from": "gpt", "value": "Ho"}]
    pd.DataFrame([{"messages": mixed}]).to_parquet(tmp_path / "a.parquet")
    frame = sources.read(tmp_path / "a.parquet")
    assert (frame["messages"][0], frame["answer"][0]) == ([{"role": "user", "content": "Hi"}], "Ho")


def test_label_numbers_of_the_library_datasets_become_their_texts(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        frame = sources.read(path, columns={"prompt": "text", "completion": "label"})
        assert frame["answer"].tolist() == ["pos", "neg", "pos"]


def test_times_and_numbers_of_a_typed_file_are_no_text(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "completion": [pd.Timestamp("2024-01-01")]})
    pd.DataFrame(table.to_pydict()).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"completion, row 1: found .*2024.* allowed is text"):
        sources.read(tmp_path / "a.parquet")
