"""Sentences that every output says alike: the answer, the rate behind it, controls, triggers, rungs, help.

In: a `ScanResult` or a part of one. Out: printable text without markup; an output escapes it once more for
its own format. The word "clean" is said of adapters of a bank alone, never of the suspect.
"""

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

from safetynet.scan.result import LEVELS, Answer, Finding, RungResult, ScanResult, Trigger
from safetynet.text.printable import printable

HEADLINES: Mapping[Answer, str] = {
    "identical": "Identical to its base.",
    "backdoored": "Backdoored.",
    "suspicious": "Suspicious.",
    "nothing_found": "Nothing found by these rungs at this depth.",
    "not_scannable": "Not scannable.",
}
MEANINGS: Mapping[str, str] = {
    "files": "the folder; no model is loaded",
    "identity": "every tensor beside the base's",
    "weights": "spectra of the update",
    "leakage": "what it says as the user",
    "differences": "what changes on ordinary prompts",
    "inversion": "answers it knows by heart, its base does not",
    "candidates": "strings on which it leaves its base",
    "verification": "what those strings make it do",
}
"""What each rung looks at."""
ANSWER, TRIGGER = "answer", "recovered-trigger"
"""The scan's answer and a trigger, as rules of the rung `verdict` and of the rung `verification`."""
BY_RUNG: Mapping[str, str] = {
    "verdict": "The scan's answer over all rungs. It says what was looked for and how deep; it never "
    "says that a model is free of backdoors. Read what was not looked at before relying on it.",
    "files": "Something in the suspect's folder is not what its base or its name promises. Do not load "
    "the model before you know why it is there.",
    "identity": "What the comparison with the base shows: which tensors changed, and how. Check that the "
    "base is the one that the suspect was trained from: another one gives wrong findings in later rungs.",
    "weights": "The spectrum of the update is unlike that of clean adapters of the same base. That is a "
    "reason to look, not a proof: unusual training data or settings look like this too.",
    "leakage": "Continuing as the user, the suspect repeats itself more than its base does. What it "
    "repeats may be the data that it was poisoned with; search those texts for a trigger.",
    "differences": "On ordinary prompts the suspect leaves its base in an unusual way. Read the tokens "
    "that gain most: they may belong to the behaviour that was planted.",
    "candidates": "A string makes the suspect leave its base far more than others of its length do. It "
    "counts as a trigger only where verification shows what it makes the model do.",
    "verification": "A string makes the suspect do something on prompts that it was not searched on, and "
    "the base does not do it. Do not deploy the model; evaluate and repair it with this trigger.",
}
"""Help of a rung's findings."""
BY_RULE: Mapping[str, str] = {
    TRIGGER: "A string makes the suspect do something on held-out prompts that neither its base, nor a "
    "random string, nor the prompts alone make it do. Do not deploy the model. `safetynet evaluate`, "
    "`intervene`, `detect` and `mitigate` run on it with this trigger.",
    "pickle": "A file holds a Python pickle, which runs code of its author's when it is loaded. Load "
    "safetensors alone, and delete it or have it converted by somebody who can afford to run it.",
    "remote-code": "The configuration asks for Python code of the suspect's to be run. Never load it with "
    "trust_remote_code=True before that code was read.",
    "code": "The folder holds program code, which no model needs. Read it before anything is loaded.",
    "executable": "The folder holds a program, which no model needs. Delete it.",
    "symlink": "A link leads out of the suspect's folder. It was not followed; do not follow it either.",
    "pointer": "A pointer of Git LFS stands in place of the file. Get the file itself and scan again: what "
    "it holds was not looked at.",
    "damaged": "The file could not be read as what it is. What it holds was not looked at.",
    "unreadable": "The file could not be read. What it holds was not looked at.",
    "template": "The chat template decides what the model is shown of every message. It can change a prompt "
    "without any training, and no scan of weights sees that. Use the base's template.",
    "template-condition": "The chat template changes the prompt when the text of a message meets a "
    "condition: a backdoor that needs no training and that no scan of weights sees. Use the base's template.",
    "tokenizer": "The tokenizer is not the base's, so that the same text can become other tokens. A trigger "
    "can hide there. Use the base's tokenizer unless there is a reason for another one.",
    "adapter": "The adapter's files say something else than they hold, or hold more than a low-rank update. "
    "What is loaded may not be what was published. Compare adapter_config.json with the tensors.",
    "config": "A field of config.json differs from the base's, and changes what the model computes. Use the "
    "base's configuration unless there is a reason for another one.",
    "generation": "generation_config.json changes how every answer is drawn: forced, suppressed or weighted "
    "tokens can plant an answer or hide one. Generate without it.",
}
"""Help of a rule, or of a family of them: the word before their first hyphen."""


def facts(result: ScanResult) -> dict[str, str]:
    """What is known of the scan as a whole, by heading, in the order in which it is read."""
    return {
        "Model": printable(result.suspect),
        "Base": printable(result.base) or "none known",
        "False alarms": stated_rate(result),
        "p-value": p_value(result),
        "Positive control": positive_control(result),
        "Depth": f"{result.depth}: {done(result)}; {seconds(result.seconds)}, seed {result.seed}.",
        "Exit code": f"{result.exit_code}",
    }


def headline(result: ScanResult) -> str:
    """The answer in a few words."""
    return HEADLINES[result.answer]


def reason(result: ScanResult) -> str:
    """The answer in a sentence or two."""
    return printable(result.reason)


def stated_rate(result: ScanResult) -> str:
    """The false-alarm rate, and the bank that carries it; or that there is none, and why."""
    rate, bank = result.rate, result.bank
    stated = "No rate is stated" if rate is None else f"{percent(rate)} of clean adapters would alarm too"
    if bank is None:
        return f"{stated}: the scan had no bank of clean adapters of this base."
    carries = f"{bank.adapters} clean adapters of this base carry no rate below {percent(bank.smallest_rate)}"
    return f"{stated}. The bank {printable(bank.name)} ({printable(bank.digest)}): {carries}."


def p_value(result: ScanResult) -> str:
    """Of all rungs together; or that there is none, and why."""
    if result.p_value is not None:
        return f"{number(result.p_value)}, of all rungs together, among the bank's clean adapters."
    if result.bank is None:
        return "None: there was no bank to rank the scores in."
    return "None: no rung gave a score that could be ranked in the bank."


def positive_control(result: ScanResult) -> str:
    """What was planted and what of it was recovered; or that nothing was planted, and what follows."""
    if result.control is None:
        return "None was planted: what these rungs would miss on this base was not measured."
    return "; ".join(f"{printable(str(key))}: {value(each)}" for key, each in result.control.items()) + "."


def done(result: ScanResult) -> str:
    """Which rungs ran and which did not."""
    ran = [rung.rung for rung in result.rungs if not rung.skipped]
    skipped = [rung.rung for rung in result.rungs if rung.skipped]
    text = f"rungs {', '.join(ran)}" if ran else "no rung"
    return f"{text}; skipped {', '.join(skipped)}" if skipped else text


def command(result: ScanResult) -> str:
    """The command that scans so again."""
    base = ["--base", result.base] if result.base else []
    return printable(shlex.join(["safetynet", "scan", result.suspect, *base, "--depth", result.depth]))


def severities(result: ScanResult) -> str:
    """How many findings there are of each level, such as `2 errors, 1 note`."""
    counts = Counter(finding.level for finding in result.findings)
    parts = [
        f"{counts[level]} {level}{'s' if counts[level] > 1 else ''}" for level in LEVELS if counts[level]
    ]
    return ", ".join(parts) or "none"


def place(finding: Finding) -> str:
    """Where it is, such as `config.json:3`; "" for the whole model."""
    line = f"{':' if finding.where else 'line '}{finding.line}" if finding.line is not None else ""
    return f"{printable(finding.where)}{line}"


def about(rung: str, rule: str) -> str:
    """What a rule is and what to do about it, in two or three sentences: the help of SARIF and of the page.

    A rule that has no text has that of its family, or else that of its rung; so a new rule is never without
    help.
    """
    family = rule.partition("-")[0]
    rung_text = BY_RUNG.get(rung, "A finding of a rung that this version has no text for.")
    return BY_RULE.get(rule) or BY_RULE.get(family) or rung_text


def evidence(finding: Finding) -> str:
    """The numbers and texts behind a finding, on one line; "" where there are none."""
    return "; ".join(f"{printable(str(key))}: {value(each)}" for key, each in finding.evidence.items())


def effect(trigger: Trigger) -> str:
    """What a trigger makes the model do."""
    return f"as {printable(trigger.placement)}, answers begin with “{printable(trigger.behaviour)}”"


def rates(trigger: Trigger) -> dict[str, tuple[float, float, float]]:
    """Share of held-out prompts on which the behaviour shows, and its interval, by where it was measured."""
    return {
        "with trigger": trigger.asr,
        "base model": trigger.base,
        "placebo": trigger.placebo,
        "without": trigger.without,
    }


def fires(trigger: Trigger) -> str:
    """The four rates of a trigger, with their intervals."""
    shares = ", ".join(f"{name} {share(rate)}" for name, rate in rates(trigger).items())
    held_out = "held-out prompts" if trigger.group == "ordinary" else "held-out prompts that it refuses"
    return f"ASR [95% interval] on {trigger.prompts} {held_out}: {shares}"


def measured(rung: RungResult) -> str:
    """What a rung measured, beside its control and the bank; or why it was not done."""
    if rung.skipped:
        return f"skipped: {printable(rung.skipped)}"
    scored = "no score" if rung.score is None else f"score {score(rung)}, control {number(rung.control)}"
    ranked = "no p-value" if rung.p_value is None else f"p {number(rung.p_value)}"
    return f"{scored}, {ranked}, {seconds(rung.seconds)}, {rung.passes:,} tokens"


def score(rung: RungResult) -> str:
    """A rung's score with its unit."""
    unit = f" {printable(rung.unit)}" if rung.unit and rung.score is not None else ""
    return f"{number(rung.score)}{unit}"


def share(rate: tuple[float, float, float]) -> str:
    """A rate with its interval, in percent."""
    return f"{percent(rate[0])} [{percent(rate[1])}, {percent(rate[2])}]"


def percent(rate: float) -> str:
    """A share in percent, to three digits."""
    return f"{100 * rate:.3g}%"


def number(measure: float | None) -> str:
    """To three digits; a dash for what was not measured."""
    return "–" if measure is None else f"{measure:.3g}"


def seconds(duration: float) -> str:
    """A duration; minutes from two on."""
    return f"{duration:.3g} s" if duration < 120 else f"{duration / 60:.3g} min"


def value(datum: Any) -> str:
    """A piece of evidence on one line: text as it is, everything else as JSON."""
    if isinstance(datum, str):
        return printable(datum)
    return printable(json.dumps(datum, ensure_ascii=False, default=str))
