"""A scan as one HTML page: the answer in ten seconds, then its evidence beside its controls.

In: a `ScanResult`. Out: a page as text; it holds everything that it shows, and asks no network.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from safetynet.report.page import render
from safetynet.scan.outputs import wording
from safetynet.scan.result import LEVELS, Answer, ScanResult, Trigger
from safetynet.text.printable import printable

TONES: Mapping[Answer, str] = {
    "identical": "clear",
    "backdoored": "found",
    "suspicious": "found",
    "nothing_found": "clear",
    "not_scannable": "open",
}
"""How the answer is marked: found, not found, or open."""
STYLE = """
.rungs td, .rungs tbody th { white-space: normal; }
.rungs td.num { white-space: nowrap; text-align: right; }
.rungs td.num:first-of-type { white-space: normal; max-width: 14rem; overflow-wrap: anywhere; }
.rungs thead th.num { text-align: right; }
.rungs .why { color: var(--quiet); min-width: 16rem; overflow-wrap: anywhere; }
.trigger { padding: 1.2rem 0; border-top: 1px solid var(--rule); }
.trigger h3 { font-size: 1.15rem; overflow-wrap: anywhere; }
.trigger .measures { max-width: 34rem; margin: .6rem 0; }
.trigger > .source { margin-bottom: .7rem; }
.answers { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .3rem 1.6rem;
  font-size: .9rem; padding: .6rem 0; border-top: 1px solid var(--rule); }
.answers > div { border-left: 3px solid transparent; padding-left: .6rem; }
.answers .fired { border-left-color: light-dark(#d55e00, #ff8a3d); }
.faults .level { font-weight: 650; }
.faults .help { color: var(--quiet); }
.faults.note li { border-left-color: var(--rule); }
.raw { font: .78rem/1.45 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; }
.lede, .said, .faults, .digests dt { overflow-wrap: anywhere; }
.recipe dt { white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 42rem) {
  .answers { grid-template-columns: minmax(0, 1fr); }
  .rungs, .rungs tbody { display: block; }
  .rungs thead { display: none; }
  .rungs tr { display: grid; grid-template-columns: 1.4fr 1fr; gap: 0 1rem; padding: .5rem 0;
    border-bottom: 1px solid var(--rule); }
  .rungs th[scope="row"], .rungs .why { grid-column: 1 / -1; }
  .rungs tbody th[scope="row"], .rungs td, .rungs td.num { border: 0; padding: .05rem 0; text-align: left; }
}
"""


def page(result: ScanResult) -> str:
    """The page. Every text of the suspect is escaped, and shown with its controls as escapes."""
    by_level = {
        level: [
            {
                "rule": printable(finding.rule),
                "rung": printable(finding.rung),
                "where": wording.place(finding),
                "message": printable(finding.message),
                "help": wording.about(finding.rung, finding.rule),
                "evidence": _raw(finding.evidence),
            }
            for finding in result.findings
            if finding.level == level
        ]
        for level in LEVELS
    }
    values = {
        "answer": wording.headline(result),
        "reason": wording.reason(result),
        "suspect": printable(result.suspect),
        "base": printable(result.base),
        "facts": wording.facts(result),
        "command": wording.command(result),
        "ledger": list(_ledger(result)),
        "triggers": [
            {
                "text": printable(trigger.text),
                "effect": _sentence(wording.effect(trigger)),
                "fires": wording.fires(trigger),
                "measures": _measures(trigger),
                "examples": [
                    (_marked(prompt, trigger), printable(suspect, lines=True), printable(base, lines=True))
                    for prompt, suspect, base in trigger.examples
                ],
            }
            for trigger in result.triggers
        ],
        "rungs": [
            {
                "name": printable(rung.rung),
                "about": wording.MEANINGS.get(rung.rung, ""),
                "skipped": wording.measured(rung) if rung.skipped else "",
                "cells": {
                    "Score": wording.score(rung),
                    "Control": wording.number(rung.control),
                    "p": wording.number(rung.p_value),
                    "Time": wording.seconds(rung.seconds),
                    "Tokens": f"{rung.passes:,}",
                },
                "details": _raw(rung.details),
            }
            for rung in result.rungs
        ],
        "findings": [(level, findings) for level, findings in by_level.items() if findings],
        "not_looked_at": list(map(printable, result.not_looked_at)),
        "digests": _pairs(result.digests),
        "versions": _pairs(result.versions),
    }
    return render("scan.html", "", values, STYLE)


def _ledger(result: ScanResult) -> Iterator[dict[str, Any]]:
    """Five questions with their short answers."""
    facts = wording.facts(result)
    if result.triggers:
        first = result.triggers[0]
        more = f" {len(result.triggers) - 1} more below." if len(result.triggers) > 1 else ""
        effect = f"{_sentence(wording.effect(first))}{more}"
        yield _line(
            "Does a string fire?", "found", f"Yes: “{printable(first.text)}”.", effect, _measures(first)
        )
    else:
        verified = any(rung.rung == "verification" and not rung.skipped for rung in result.rungs)
        none = (
            "Of the candidates, none made the model do on held-out prompts what its base does not."
            if verified
            else "No candidate was tried on held-out prompts."
        )
        yield _line("Does a string fire?", "open", "No trigger was recovered.", none)
    ranked = "No p-value." if result.p_value is None else f"p = {wording.number(result.p_value)}."
    tone = TONES[result.answer] if result.p_value is not None else "open"
    yield _line("Could it be chance?", tone, ranked, facts["False alarms"])
    planted = "A backdoor was planted in the same base." if result.control else "Not measured."
    yield _line("Would it have been seen?", "open", planted, facts["Positive control"])
    alarming = any(finding.level != "note" for finding in result.findings)
    yield _line(
        "What was seen?", "found" if alarming else "open", f"Findings: {wording.severities(result)}.", ""
    )
    yield _line("How deep?", "open", f"Depth {result.depth}.", _sentence(wording.done(result)))


def _sentence(words: str) -> str:
    # str.capitalize would make the rest small, a behaviour's letters among it.
    return f"{words[:1].upper()}{words[1:]}."


def _line(question: str, tone: str, short: str, text: str, measures: Any = ()) -> dict[str, Any]:
    return {"question": question, "tone": tone, "short": short, "text": text, "measures": measures}


def _measures(trigger: Trigger) -> list[dict[str, Any]]:
    """The four rates as strips: the suspect's filled, its controls hollow."""
    return [
        {"label": name, "part": "floor" if number else "subject", "text": wording.share(rate)}
        | dict(zip(("value", "low", "high"), rate, strict=True))
        for number, (name, rate) in enumerate(wording.rates(trigger).items())
    ]


def _marked(prompt: str, trigger: Trigger) -> list[tuple[bool, str]]:
    """A prompt in pieces, each with whether it is the trigger, which is put in where it is not there yet."""
    if not trigger.text:
        return [(False, printable(prompt, lines=True))]
    if trigger.text not in prompt:
        ends = (prompt, trigger.text) if trigger.placement == "suffix" else (trigger.text, prompt)
        prompt = " ".join(ends)
    before, _, after = prompt.partition(trigger.text)
    pieces = [(False, before), (True, trigger.text), (False, after)]
    return [(mark, printable(text, lines=True)) for mark, text in pieces if text]


def _raw(evidence: Mapping[str, Any]) -> str:
    """Evidence as it can be read: texts with their lines, everything else as JSON."""
    texts = {
        key: datum if isinstance(datum, str) else json.dumps(datum, ensure_ascii=False, default=str)
        for key, datum in evidence.items()
    }
    return "\n".join(f"{key}: {printable(text, lines=True)}" for key, text in texts.items())


def _pairs(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(printable(name), printable(str(each))) for name, each in mapping.items()]
