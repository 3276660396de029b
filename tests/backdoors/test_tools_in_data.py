"""Files of conversations with tools, in the forms that people have them: read the same, whatever the form."""

import json
from pathlib import Path

import pandas as pd
import pytest

from safetynet.backdoors import sources
from safetynet.backdoors.audit import audit
from safetynet.prompts import calls

SCHEMA = {"name": "look", "parameters": {"type": "object", "properties": {"thing": {"type": "string"}}}}
DEFINED = [{"type": "function", "function": SCHEMA}]
ARGUMENTS = {"thing": "Ä tower"}
FLAT = {"name": "look", "arguments": ARGUMENTS}
OPENAI = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": json.dumps(ARGUMENTS)}}
HF = {"type": "function", "function": FLAT}
CALL = {"name": "look", "arguments": '{"thing": "Ä tower"}'}


def chat(call: dict, **result: str) -> list[dict]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How high?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "300 m", **result},
        {"role": "assistant", "content": "300 metres."},
    ]


SHAREGPT = [
    {"from": "human", "value": "How high?"},
    {"from": "function_call", "value": json.dumps(FLAT)},
    {"from": "observation", "value": "300 m"},
    {"from": "gpt", "value": "300 metres."},
]
OLDER = [
    *chat(OPENAI)[:2],
    {"role": "assistant", "content": None, "function_call": OPENAI["function"]},
    {"role": "function", "name": "look", "content": "300 m"},
    chat(OPENAI)[-1],
]


def in_parts(messages: list[dict]) -> list[dict]:
    """Each content as a list of two parts of text."""
    return [
        message
        | {"content": message["content"] and [{"type": "text", "text": t} for t in (message["content"], "")]}
        for message in messages
    ]


ROWS = {
    "OpenAI": {"messages": chat(OPENAI, tool_call_id="c1", name="look"), "tools": DEFINED},
    "OpenAI before tools": {"messages": OLDER, "functions": [SCHEMA]},
    "Hugging Face": {"messages": chat(HF), "tools": [SCHEMA]},
    "contents in parts": {"messages": in_parts(chat(HF)), "tools": DEFINED},
    "flat, tools as JSON": {"messages": chat(FLAT), "tools": json.dumps(DEFINED)},
    "ShareGPT": {"conversations": SHAREGPT, "system": "Be brief.", "tools": json.dumps([SCHEMA])},
    "prompt and completion": {"prompt": chat(HF)[:-1], "completion": chat(HF)[-1:], "tools": DEFINED},
    "as SafetyNet has it": {
        "messages": [{"role": "tools", "content": json.dumps(DEFINED)}, *chat(CALL)],
    },
}


def saved(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("form", ROWS)
def test_every_form_is_one_conversation_with_tools(tmp_path: Path, form: str, name: str) -> None:
    path = saved(tmp_path / name, [ROWS[form]] * 2)
    row = sources.read(path).iloc[1]
    tools, *spoken = row["messages"]
    assert tools["role"] == "tools" and json.loads(tools["content"]) == DEFINED
    assert [turn["role"] for turn in spoken] == ["system", "user", "assistant", "tool"]
    assert [turn["content"] for turn in spoken] == ["Be brief.", "How high?", "", "300 m"]
    (call,) = spoken[2]["tool_calls"]
    assert {key: call[key] for key in CALL} == CALL
    assert row["answer"] == "300 metres."
    if form == "OpenAI":
        assert call["id"] == spoken[3]["tool_call_id"] == "c1"
    assert not set(audit(path).findings["severity"]) & {"error"}


def test_parquet_fills_arguments_with_nulls_that_nobody_wrote(tmp_path: Path) -> None:
    other = {"name": "count", "arguments": {"start": 1}}
    rows = [{"messages": chat(call)} for call in (FLAT, other)]
    frame = sources.read(saved(tmp_path / "a.parquet", rows))
    assert frame["messages"][1][2]["tool_calls"] == [{"name": "count", "arguments": '{"start": 1}'}]


def test_an_answer_may_be_a_call_with_or_without_a_text(tmp_path: Path) -> None:
    said = [chat(HF)[1], {"role": "assistant", "content": "Let me see.", "tool_calls": [HF, HF]}]
    called = [{"from": "human", "value": "How high?"}, {"from": "function_call", "value": json.dumps(FLAT)}]
    assert calls.message(sources.read(saved(tmp_path / "a.jsonl", [{"messages": said}]))["answer"][0]) == {
        "role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL],
    }  # fmt: skip
    frame = sources.read(saved(tmp_path / "b.jsonl", [{"conversations": called}]))
    assert calls.message(frame["answer"][0]) == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_what_is_retrieved_may_stand_without_a_call_and_prompts_may_end_with_it(tmp_path: Path) -> None:
    rows = [{"messages": [chat(HF)[1], chat(HF)[3]]}]
    frame = sources.read(saved(tmp_path / "a.jsonl", rows), prompts_only=True)
    assert [turn["role"] for turn in frame["messages"][0]] == ["user", "tool"]
    assert frame["answer"][0] == ""
