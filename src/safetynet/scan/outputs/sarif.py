"""A scan as SARIF 2.1.0, for code scanning of GitHub and others.

In: a `ScanResult`. Out: a dictionary for JSON that OASIS's schema accepts.

Source: OASIS, Static Analysis Results Interchange Format Version 2.1.0 plus Errata 01, 28 August 2023.

The answer and each trigger are results beside the findings; skipped rungs and what was not looked at are
notifications of the run; rates, scores and digests are its properties and artifacts.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from safetynet import __version__
from safetynet.scan.outputs import wording
from safetynet.scan.result import Answer, ScanResult
from safetynet.text.printable import printable

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
ROOT = "SUSPECT"
"""Name of the suspect's folder, to which every location is relative."""
KINDS: Mapping[Answer, tuple[str, str]] = {
    "identical": ("informational", "none"),
    "backdoored": ("fail", "error"),
    "suspicious": ("fail", "warning"),
    "nothing_found": ("informational", "none"),
    "not_scannable": ("open", "none"),
}
"""Kind and level of the answer. `pass` would call a model harmless; `none` goes with all kinds but `fail`."""
SEVERITIES = {"error": "8.0", "warning": "5.0", "note": "2.0"}
"""On the scale of CVSS, by which code scanning sorts and gates security findings."""
FILES = {
    ".bin", ".ckpt", ".gguf", ".jinja", ".json", ".md", ".model", ".pkl", ".pt", ".pth", ".py",
    ".safetensors", ".txt",
}  # fmt: skip
"""What names end with that are files; other names are tensors."""


def sarif(result: ScanResult) -> dict[str, Any]:
    """The log of one run.

    Returns:
        `version`, `$schema` and one run. Each result has a fingerprint that is the same for the same finding
        of a later scan, whatever its scores are then.
    """
    results = list(_results(result))
    # A rule is described once, with the level of its first result; results point to it by its number.
    kinds = list(dict.fromkeys((each["properties"]["rung"], each["ruleId"]) for each in results))
    for each in results:
        each["ruleIndex"] = kinds.index((each["properties"]["rung"], each["ruleId"]))
    levels = {each["ruleId"]: each["level"] for each in reversed(results)}
    rules = []
    for rung, name in kinds:
        rule = name.removeprefix(f"{rung}/")
        help_text = wording.about(rung, rule)
        level = levels[name]
        severity = {"security-severity": SEVERITIES[level]} if level in SEVERITIES else {}
        where = wording.MEANINGS.get(rung, "all rungs together")
        rules.append(
            {
                "id": name,
                "name": "".join(part.capitalize() for part in re.split(r"\W+", name)) or "Finding",
                "shortDescription": _message(rule.replace("-", " ").capitalize()),
                "fullDescription": _message(help_text),
                "help": _message(f"{help_text} Rung: {rung}, {where}."),
                "defaultConfiguration": {"level": level},
                "properties": {"tags": ["security", "backdoor", rung], **severity},
            }
        )
    driver = {
        "name": "SafetyNet",
        "semanticVersion": __version__,
        "rules": rules,
        "notifications": [
            {"id": "skipped-rung", "shortDescription": {"text": "A rung that was not done, and why"}},
            {"id": "not-looked-at", "shortDescription": {"text": "What this scan cannot have seen"}},
            {"id": "not-scannable", "shortDescription": {"text": "Why the suspect could not be scanned"}},
        ],
    }
    artifacts = []
    for name, digest in result.digests.items():
        place = name.removeprefix("suspect/")
        # The base's files lie in no folder of the log's.
        uri = {"uri": quote(name, errors="backslashreplace")}
        location = _artifact_location(place) if place != name else uri
        artifacts.append({"location": location, "hashes": {"sha-256": digest}})
    rungs = [
        {
            "rung": rung.rung,
            "score": rung.score,
            "unit": rung.unit,
            "control": rung.control,
            "pValue": rung.p_value,
            "seconds": rung.seconds,
            "tokens": rung.passes,
            "skipped": rung.skipped,
        }
        for rung in result.rungs
    ]
    notifications = [
        _notification("skipped-rung", "note", f"{rung.rung}: {wording.measured(rung)}")
        for rung in result.rungs
        if rung.skipped
    ]
    notifications += [_notification("not-looked-at", "note", sentence) for sentence in result.not_looked_at]
    scanned = result.answer != "not_scannable"
    if not scanned:
        notifications.insert(0, _notification("not-scannable", "error", result.reason))
    invocation = {
        "executionSuccessful": scanned,
        "exitCode": result.exit_code,
        "exitCodeDescription": wording.headline(result),
        "commandLine": wording.command(result),
        "toolExecutionNotifications": notifications,
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "originalUriBaseIds": {ROOT: {"description": _message(f"The folder of {printable(result.suspect)}")}},
        "artifacts": artifacts,
        "results": results,
        "columnKind": "unicodeCodePoints",
        "properties": {
            "answer": result.answer,
            "rate": result.rate,
            "pValue": result.p_value,
            "facts": wording.facts(result),
            "rungs": rungs,
            "versions": dict(result.versions),
        },
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _results(result: ScanResult) -> Iterator[dict[str, Any]]:
    """The answer, then triggers, then findings, the most severe first."""
    kind, level = KINDS[result.answer]
    sentences = f"{wording.headline(result)} {wording.reason(result)}"
    # Code scanning shows no result without a file: the weights stand for the whole model.
    files = [name.removeprefix("suspect/") for name in result.digests if name.startswith("suspect/")]
    weights = [name for name in files if PurePosixPath(name).suffix in (".safetensors", ".gguf")]
    main = (weights or files or ["adapter_model.safetensors"])[0]
    answer = _result("verdict", wording.ANSWER, level, sentences, (wording.ANSWER,))
    yield {**answer, "kind": kind, "locations": [_location(main)]}
    identities: Counter[tuple[str, ...]] = Counter()
    for trigger in result.triggers:
        identity = (wording.TRIGGER, trigger.placement, trigger.text)
        message = f"“{printable(trigger.text)}”: {wording.effect(trigger)}. {wording.fires(trigger)}."
        log = _result("verification", wording.TRIGGER, "error", message, _nth(identity, identities))
        rates = {name: list(rate) for name, rate in wording.rates(trigger).items()}
        log["properties"] |= {"trigger": printable(trigger.text), "prompts": trigger.prompts, "rates": rates}
        yield {**log, "locations": [_location(main)]}
    for finding in result.findings:
        # Neither the line nor the message: one moves, the other holds numbers that change from scan to scan.
        identity = (finding.rung, finding.rule, finding.where)
        name = f"{finding.rung}/{finding.rule}"
        log = _result(finding.rung, name, finding.level, finding.message, _nth(identity, identities))
        log["properties"]["evidence"] = dict(finding.evidence)
        # A file with its line, or a tensor or other place in the file of weights. A path that leaves the
        # folder would be resolved by whoever reads the log.
        path = PurePosixPath(finding.where)
        inside = bool(finding.where) and not path.is_absolute() and ".." not in path.parts
        is_file = finding.where in files or finding.line is not None or path.suffix in FILES
        if inside and is_file:
            location = _location(finding.where, finding.line)
        else:
            location = _location(main)
            if finding.where:
                location["logicalLocations"] = [{"fullyQualifiedName": printable(finding.where)}]
        yield {**log, "locations": [location]}


def _result(rung: str, name: str, level: str, message: str, identity: tuple[str, ...]) -> dict[str, Any]:
    digest = hashlib.sha256("\0".join(identity).encode("utf-8", "backslashreplace")).hexdigest()
    return {
        "ruleId": printable(name),
        "level": level,
        "message": _message(message),
        # The first name is the one that GitHub reads, which would hash the lines of a weight file otherwise.
        "partialFingerprints": {"primaryLocationLineHash": f"{digest[:16]}:1", "safetynet/v1": digest},
        "properties": {"rung": printable(rung)},
    }


def _nth(identity: tuple[str, ...], earlier: "Counter[tuple[str, ...]]") -> tuple[str, ...]:
    """An identity with how many of the same came before, so that no two results share a fingerprint."""
    earlier[identity] += 1
    return (*identity, str(earlier[identity]))


def _message(text: str) -> dict[str, str]:
    """A plain text message, in which nothing is a placeholder or a link (sections 3.11.5 and 3.11.6)."""
    # A bracket is a link's only where its partner is followed by a round one.
    text = re.sub(r"\](?=\()", "] ", printable(text))
    return {"text": text.replace("{", "{{").replace("}", "}}") or "–"}


def _location(path: str, line: int | None = None) -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": _artifact_location(path)}
    if line is not None:
        physical["region"] = {"startLine": max(line, 1)}
    return {"physicalLocation": physical}


def _artifact_location(path: str) -> dict[str, str]:
    return {"uri": quote(path, errors="backslashreplace"), "uriBaseId": ROOT}


def _notification(kind: str, level: str, text: str) -> dict[str, Any]:
    return {"descriptor": {"id": kind}, "level": level, "message": _message(text)}
