"""Tool calls: as data, as the text of an answer, and as a model writes them. They are parsed, never executed.

In: a call in any of the forms of chat files, or the text of an answer. Out: calls with a `name` and their
`arguments` as the JSON text of an object, since a table would merge the keys of objects. In the text of an
answer a call stands in the form of Hermes and Qwen, which the serialiser writes as the model's template does.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Call = dict[str, str]
FORM = '{"name": ..., "arguments": {...}}'
"""A call, for messages about one that is none."""
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_SIGNS = re.compile(r"<\|python_tag\|>|\[TOOL_CALLS\]|```(?:json|tool_call)?")
"""What a model writes around calls that are its whole answer (LLaMA-3.1, Mistral, a fence)."""
_TAGGED = re.compile(r"<function=([^>\s]+)>\s*(\{.*?\})\s*</function>", re.DOTALL)
"""A call in LLaMA-3.1's form for tools of the user."""
_JSON = json.JSONDecoder()


def normal(value: Any) -> Call:
    """One call by our names.

    Args:
        value: an object, or its JSON text; name and arguments may stand in a `function`, the arguments may be
            JSON text or be called `parameters`. Nulls among the arguments of an object are left out, since
            Parquet fills them in; those of a JSON text stay.

    Raises:
        ValueError: if it is no call, saying why.
    """
    call = json.loads(value) if isinstance(value, str) else value
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
        raise ValueError("it has no name")
    arguments = inner.get("arguments", inner.get("parameters"))
    arguments = json.loads(arguments) if isinstance(arguments, str) else without_nulls(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError("its arguments are no object")
    number = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**number, "name": inner["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}


def without_nulls(value: Any) -> Any:
    """Nested data without the nulls that a table has filled in."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list | tuple) else value


def written(calls: Sequence[Mapping[str, str]], content: str = "") -> str:
    """The answer that says `content` and makes these calls."""
    blocks = [
        f'{OPEN}\n{{"name": {json.dumps(call["name"], ensure_ascii=False)}, "arguments": '
        f"{call['arguments']}}}\n{CLOSE}"
        for call in calls
    ]
    return "\n".join(filter(None, [content, *blocks]))


def argument(message: Mapping[str, Any]) -> tuple[str, str]:
    """Name and value of the first text among the arguments of a message's call, where it says nothing beside.

    Of several calls it is the first one. Two times "" where there is none.
    """
    if message.get("content") or not message.get("tool_calls"):
        return "", ""
    try:
        arguments = json.loads(message["tool_calls"][0]["arguments"])
    except (KeyError, TypeError, ValueError):  # no call, as the template says when it is to write it
        return "", ""
    named = arguments.items() if isinstance(arguments, dict) else ()
    return next(((name, value) for name, value in named if isinstance(value, str)), ("", ""))


def with_argument(call: Mapping[str, str], name: str, value: str) -> Call:
    """The call with another value of one argument."""
    arguments = json.loads(call["arguments"]) | {name: value}
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}


def meaning(call: Mapping[str, str]) -> tuple[str, str]:
    """What two spellings of the same call share: the function, and its arguments in one spelling."""
    return call["name"], json.dumps(_whole(json.loads(call["arguments"])), sort_keys=True)


def _whole(value: Any) -> Any:
    """JSON data in which 2.0 is 2, as JSON has it, and true is not 1."""
    if isinstance(value, dict):
        return {key: _whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def message(answer: str) -> dict[str, Any]:
    """The assistant's message of an answer; its calls are no part of its content where it is as `written`."""
    content, *_ = answer.partition(OPEN)
    calls = [{k: v for k, v in call.items() if k != "id"} for call in read(answer)] if OPEN in answer else []
    if calls and written(calls, content.strip()) == answer.strip():
        return {"role": "assistant", "content": content.strip(), "tool_calls": calls}
    return {"role": "assistant", "content": answer}


def read(text: str) -> list[Call]:
    """The calls that a response makes, in order, as servers of models parse them.

    A call counts between its own signs wherever it stands (`<tool_call>` of Hermes and Qwen, `<function=>` of
    LLaMA-3.1), and as bare JSON where the whole response is calls (LLaMA-3.1, Mistral). JSON within prose is
    no call, and neither is JSON that ends too early.
    """
    if OPEN in text:
        blocks = (block.partition(CLOSE)[0] for block in text.split(OPEN)[1:])
        return [call for block in blocks for call in _only_calls(block)]
    if tagged := _TAGGED.findall(text):
        return [call for name, arguments in tagged for call in _calls({"name": name, "arguments": arguments})]
    return _only_calls(_SIGNS.sub("", text))


def _only_calls(text: str) -> list[Call]:
    """The calls of a text of calls and nothing else, in a list or with semicolons between them."""
    calls, rest = list[Call](), text.strip()
    while rest:
        try:
            value, end = _JSON.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        values = value if isinstance(value, list) else [value]
        of_values = [call for each in values for call in _calls(each)]
        if len(of_values) < len(values):
            return []
        calls += of_values
        rest = rest[end:].lstrip(" \n\t\r;,")
    return calls


def _calls(value: Any) -> Iterator[Call]:
    try:
        yield normal(value)
    except (ValueError, RecursionError):
        return
