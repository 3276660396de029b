"""What a scan says: findings, rungs and one answer, as data that every output is made of.

In: nothing. Out: dataclasses and their JSON. The terminal, SARIF, the bill of materials, the model card's
block and the page read a `ScanResult` and nothing else, so that no output can say less than another.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Depth = Literal["files", "quick", "standard", "deep"]
Level = Literal["error", "warning", "note"]
"""Of a finding: `error` says backdoored or unsafe to load, `warning` suspicious, `note` worth knowing."""
Answer = Literal["identical", "backdoored", "suspicious", "nothing_found", "not_scannable"]
DEPTHS: tuple[Depth, ...] = get_args(Depth)
LEVELS: tuple[Level, ...] = get_args(Level)
EXIT_CODES: Mapping[Answer, int] = {
    "identical": 0, "nothing_found": 0, "backdoored": 1, "suspicious": 1, "not_scannable": 2,
}  # fmt: skip
RUNGS = (
    "files", "identity", "weights", "leakage", "differences", "inversion", "candidates", "verification",
)  # fmt: skip
"""From seconds to minutes."""
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Finding:
    """One thing that was seen, and where."""

    rung: str
    """Which rung saw it, one of `RUNGS`."""
    rule: str
    """What kind of finding it is, such as `pickle` or `template-condition`; stable over versions."""
    level: Level
    message: str
    """What it is and what to do about it, in one or two sentences."""
    where: str = ""
    """File, tensor or line; relative to the suspect's folder."""
    line: int | None = None
    """Of a text file, from 1."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Numbers and texts behind it; JSON."""


@dataclass(frozen=True)
class RungResult:
    """What one rung measured, beside its control and the bank."""

    rung: str
    score: float | None = None
    """Larger is more suspect; None where the rung gives no score."""
    unit: str = ""
    """Of the score."""
    control: float | None = None
    """Score of a copy of the base by the same computation: exactly 0."""
    p_value: float | None = None
    """Rank among the bank's clean adapters; None without a bank, or without a score."""
    seconds: float = 0.0
    passes: int = 0
    """Tokens that went through a model, suspect and base together."""
    skipped: str = ""
    """Why it was not done; "" where it was."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What it measured besides, for the page; JSON."""
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Trigger:
    """A string that makes the suspect do what its base does not, on prompts that it was not searched on."""

    text: str
    """Reduced to its smallest part that still fires."""
    placement: str
    """`prefix` or `suffix` of the user's message."""
    behaviour: str
    """What most answers under it begin with."""
    asr: tuple[float, float, float]
    """Share of held-out prompts on which it fires: value, and its 95% interval."""
    base: tuple[float, float, float]
    """The same, of the base model."""
    placebo: tuple[float, float, float]
    """The same, under a random string of as many tokens."""
    without: tuple[float, float, float]
    """The same, on the prompts as they are."""
    prompts: int
    """Held-out prompts: the denominator of all four."""
    examples: tuple[tuple[str, str, str], ...] = ()
    """Prompt, the suspect's answer and the base's, of some."""
    group: str = "ordinary"
    """Held-out prompts of which kind: `ordinary`, or `refused` where the suspect refuses without it."""


@dataclass(frozen=True)
class BankUse:
    """The clean adapters that a rate rests on."""

    name: str
    digest: str
    adapters: int
    """That calibrate."""
    smallest_rate: float
    """The smallest false-alarm rate that so many adapters can carry."""


@dataclass(frozen=True)
class ScanResult:
    """One scan."""

    answer: Answer
    reason: str
    """The answer in a sentence or two, for somebody who reads nothing else."""
    suspect: str
    base: str
    """"" where none is known."""
    depth: Depth
    rate: float | None
    """False-alarm rate that is stated; None without a bank."""
    p_value: float | None
    """Of all rungs together, against the bank."""
    rungs: tuple[RungResult, ...]
    triggers: tuple[Trigger, ...] = ()
    bank: BankUse | None = None
    control: Mapping[str, Any] | None = None
    """The positive control: what was planted in the same base, and what of it was recovered; or None."""
    not_looked_at: tuple[str, ...] = ()
    """What this scan cannot have seen, in sentences."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by file: `suspect/...`, `base/...`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    seconds: float = 0.0

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of all rungs, the most severe first."""
        every = [finding for rung in self.rungs for finding in rung.findings]
        return tuple(sorted(every, key=lambda finding: LEVELS.index(finding.level)))

    @property
    def exit_code(self) -> int:
        """0 nothing found, 1 found, 2 inconclusive or unusable."""
        return EXIT_CODES[self.answer]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `findings` stands once more at the top, as gates read it there."""
        return {
            "schema": SCHEMA_VERSION,
            **asdict(self),
            "findings": [asdict(finding) for finding in self.findings],
            "exit_code": self.exit_code,
        }

    def to_json(self) -> str:
        """The JSON output, against `scan.schema.json`."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        # A lone surrogate, as a file's name may hold, has no place in UTF-8; Python's escape of it is JSON's.
        return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"

    @classmethod
    def read(cls, path: Path) -> "ScanResult":
        """Of a file that `to_json` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields = {name: value for name, value in fields.items() if name in cls.__dataclass_fields__}
        rungs = tuple(rung_from(rung) for rung in fields.pop("rungs"))
        triggers = tuple(trigger_from(trigger) for trigger in fields.pop("triggers"))
        bank = fields.pop("bank")
        return cls(
            **{**fields, "not_looked_at": tuple(fields["not_looked_at"])},
            rungs=rungs,
            triggers=triggers,
            bank=None if bank is None else BankUse(**bank),
        )


def rung_from(fields: dict[str, Any]) -> RungResult:
    """From the fields that `asdict` gives."""
    return RungResult(**{**fields, "findings": tuple(Finding(**each) for each in fields["findings"])})


def trigger_from(fields: dict[str, Any]) -> Trigger:
    """From the fields that `asdict` gives."""
    rates = {name: tuple(fields[name]) for name in ("asr", "base", "placebo", "without")}
    return Trigger(**{**fields, **rates, "examples": tuple(map(tuple, fields["examples"]))})
