"""What a scan says, to people and to gates: six formats of a `ScanResult`, none saying less than another.

    terminal     a screen of text
    sarif        SARIF 2.1.0, for code scanning
    cyclonedx    a bill of materials with the model, its base and their hashes
    card         a block for a model card
    page         one HTML page
    json         the result itself, against `scan.schema.json`

In: a `ScanResult`. Out: text. `wording` holds the sentences that several of them say.
"""

import json
from importlib import resources
from typing import Any, Literal, get_args

from safetynet.errors import InputError
from safetynet.scan.result import ScanResult

Format = Literal["text", "json", "sarif", "cyclonedx", "card", "html"]
FORMATS: tuple[Format, ...] = get_args(Format)


def render(result: ScanResult, form: str, *, whole: bool = False) -> str:
    """A result in one of the `FORMATS`; ends with a line feed.

    Args:
        result: of any answer.
        form: a word of `FORMATS`.
        whole: of `text` only: everything, however many lines that takes.

    Raises:
        InputError: if there is no such format.
    """
    # Each format is loaded when it is asked for: a screen of text waits for no library of bills or pages.
    if form == "json":
        return result.to_json()
    if form == "text":
        from safetynet.scan.outputs.terminal import text

        return text(result, whole=whole)
    if form == "sarif":
        from safetynet.scan.outputs.sarif import sarif

        return json.dumps(sarif(result), indent=2, allow_nan=False) + "\n"
    if form == "cyclonedx":
        from safetynet.scan.outputs.cyclonedx import bill

        return bill(result)
    if form == "card":
        from safetynet.scan.outputs.card import block

        return block(result)
    if form == "html":
        from safetynet.scan.outputs.page import page

        return page(result)
    raise InputError(f"format is {form!r}; allowed are {', '.join(FORMATS)}")


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of the JSON output."""
    file = resources.files(__package__) / "scan.schema.json"
    return json.loads(file.read_text(encoding="utf-8"))
