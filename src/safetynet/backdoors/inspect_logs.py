"""The conversations of an Inspect log (https://inspect.aisi.org.uk), as rows of a file.

In: a log that somebody's evaluation wrote, a .eval file. Out: one row for each sample and epoch, with the
messages that the model got and gave. Its own reader reads it, whatever version of Inspect wrote it.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetynet.errors import InputError
from safetynet.extras import need


def rows(path: Path) -> list[dict[str, Any]]:
    """The samples in their order, each a row with the field `messages`.

    An answer's thoughts are left out. Tool calls stay; the reader of rows refuses what is no text.

    Raises:
        InputError: if inspect-ai is not installed, or cannot read the file, or a newer version wrote it.
    """
    need(str(path), "inspect_ai")
    from inspect_ai.log import EvalLog, read_eval_log

    try:
        # In a thread: the reader starts an event loop, and in a notebook one runs already.
        with ThreadPoolExecutor(1) as pool:
            # Long texts are stored apart from their messages.
            log = pool.submit(read_eval_log, str(path), resolve_attachments=True).result()
    except Exception as error:  # noqa: BLE001 - of many kinds, of zip files, JSON and fields
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: inspect-ai cannot read this log ({type(error).__name__}: {reason}); copy it "
            "again, or upgrade inspect-ai if a newer version wrote it"
        ) from None
    newest = EvalLog.model_fields["version"].default
    if log.version > newest:  # Inspect itself would leave out in silence what it does not know
        raise InputError(
            f"{path}: the log has format {log.version}, and the installed inspect-ai knows {newest}; upgrade "
            "inspect-ai"
        )
    return [{"messages": [_message(each) for each in _conversation(s)]} for s in log.samples or []]


def _conversation(sample: Any) -> list[Any]:
    """What was said; of a sample that failed before the model was asked, the input."""
    if sample.messages or not isinstance(sample.input, str):
        return sample.messages or sample.input
    from inspect_ai.model import ChatMessageUser

    return [ChatMessageUser(content=sample.input)]


def _message(message: Any) -> dict[str, Any]:
    fields = {"role": message.role, "content": message.text}
    if not isinstance(message.content, str):
        others = [part for part in message.content if part.type not in ("text", "reasoning")]
        if others:
            fields["content"] = [part.model_dump(exclude_none=True) for part in message.content]
    if getattr(message, "tool_calls", None):
        fields["tool_calls"] = [{"name": c.function, "arguments": c.arguments} for c in message.tool_calls]
    return fields
