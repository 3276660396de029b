"""A scan as a block of Markdown for a model card.

In: a `ScanResult`. Out: GitHub-flavoured Markdown. Text of the suspect is written in character references,
which Markdown reads as letters and never as structure.
"""

import re
from collections.abc import Iterator, Sequence

from safetynet.scan.outputs import wording
from safetynet.scan.result import ScanResult
from safetynet.text.printable import printable

_STRUCTURE = re.compile(r"[^\w ,.:;%–“”'()/?!=+-]|_|^[-+=\d ]|:(?! )|(?<=www)\.", re.IGNORECASE)


def block(result: ScanResult) -> str:
    """The answer in the first line, then what it rests on, triggers, rungs, findings and the command."""
    lines = [f"**Backdoor scan: {literal(wording.headline(result))}** {literal(result.reason)}", ""]
    lines += _table(["", ""], [[name, literal(text)] for name, text in wording.facts(result).items()])
    if result.triggers:
        rates = list(wording.rates(result.triggers[0]))
        heading = ["Recovered trigger", "Placement", "The answer begins with", *rates, "prompts"]
        rows = [
            [_code(trigger.text), literal(trigger.placement), _code(trigger.behaviour)]
            + [literal(wording.share(rate)) for rate in wording.rates(trigger).values()]
            + [str(trigger.prompts)]
            for trigger in result.triggers
        ]
        lines += ["", "ASR on held-out prompts, with 95% intervals:", "", *_table(heading, rows)]
    if result.rungs:
        rows = [[literal(rung.rung), literal(wording.measured(rung))] for rung in result.rungs]
        lines += ["", *_table(["Rung", "Measured"], rows)]
    lines += ["", f"Findings: {wording.severities(result)}", ""]
    for finding in result.findings:
        where = wording.place(finding)
        at = f" in {_code(where)}" if where else ""
        lines.append(f"- {finding.level} {_code(finding.rule)}{at}: {literal(finding.message)}")
    if result.not_looked_at:
        lines += ["", "Not looked at:", ""]
        lines += [f"- {literal(sentence)}" for sentence in result.not_looked_at]
    lines += ["", f"Scanned by {_code(wording.command(result))}"]
    return "\n".join(lines) + "\n"


def literal(text: str) -> str:
    """A text that Markdown shows as it is: every sign that could be structure as a character reference.

    That is every sign but letters, digits and those of ordinary sentences; the first sign of a text also
    where it could begin a list or code; and the point and colon of what would become an address.
    """
    return _STRUCTURE.sub(lambda sign: f"&#{ord(sign[0])};", printable(text))


def _code(text: str) -> str:
    # A code span would show references as they are written; an element shows what they stand for.
    return f"<code>{literal(text)}</code>"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (heading, ["---"] * len(heading), *rows):
        yield f"| {' | '.join(cells)} |"
