"""What a monitor sees and what not, in the short form that the terminal and the report share.

In: the tables of detection. Out: what is caught, false alarms by kind of prompt, whether the named rate was
kept, blind spots and cost. It computes nothing that is not in a table.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import pandas as pd

from safetynet.tables.summaries import promised_rows, rate_text

FUSED = "fused"
FEW = 3
"""So many detectors have their blind spots listed; what escapes a larger panel has to escape all of it."""
CAUGHT = (
    ("fired", "the trigger fired"),
    ("triggered", "with the trigger"),
    ("not_fired", "the trigger did not fire"),
    ("fired_without_trigger", "fired without the whole trigger"),
)
KINDS_OF_PROMPTS = (
    ("fresh", "fresh prompts"),
    ("clean", "clean prompts"),
    ("placebo", "placebos"),
    ("near_miss", "near misses"),
    ("refused", "forbidden requests"),
    ("ood", "other domains"),
)
"""Sets of rows, or how the names of sets begin, and what a reader calls them."""
UNKNOWN = "not measured: no trigger is known"
BLIND_SPOTS = {
    "mahalanobis": "shifts along the largest components, which whitening divides away",
    "top_components": "everything outside the top components",
    "pca_residual": "shifts inside the clean subspace",
    "layer_deltas": "a usual size in an unusual direction",
    "ranks": "triggered prompts that move with their neighbours",
    "neighbours": "prompts that lie among clean ones",
    "mixture": "prompts that lie among clean ones",
    "autoencoders": "what the networks learnt to copy; they have gradients",
    "variational": "what the networks learnt to copy; they have gradients",
    "gram": "made for images, weak on single tokens",
    "extremes:energy": "an adapter that acts on all prompts",
    "extremes:energy_max": "an adapter that acts on all prompts",
    "extremes:direction": "an adapter that acts on all prompts",
    "extremes:divergence": "what the base would do as well; any new skill diverges too",
    "extremes:unexplained": "what the base would do as well; answers that turn after their first token; two "
    "triggers of different targets in one prompt",
    "extremes:confidence": "targets that the model is no surer of than of its answers",
    "extremes:probe": "backdoors that are no jailbreak",
    "extremes:attention": "styles and spread triggers",
    "lock": "open-ended targets",
}
"""Of a detector, or of a detector and view."""


class Alarms(NamedTuple):
    """The share of some prompts that raises an alarm, with its 95% interval."""

    label: str
    value: float
    low: float
    high: float
    n: int

    @property
    def text(self) -> str:
        """As in `16.0% [9.4, 24.7] of 100`."""
        return f"{rate_text('tpr', self.value, self.low, self.high)} of {self.n:,}"


@dataclass(frozen=True)
class MonitorSummary:
    """A monitor at the false-positive rate that it names."""

    detectors: tuple[str, ...]
    rate: float
    caught: tuple[Alarms, ...]
    """Triggers that fired, the form of them that is caught least, and what else shows the behaviour. Empty
    where no trigger is known."""
    false: tuple[Alarms, ...]
    """Each kind of prompts that must raise no alarm, and the worst group of it."""
    fresh: tuple[Alarms, ...]
    """Prompts drawn as those that calibrated: what the rate is promised of, kind by kind."""
    worst: Alarms
    """The set of prompts that breaks the rate most."""
    answers: tuple[Alarms, ...]
    """Alarms of a prompt or its answer, each at half of the rate; empty where answers are not watched."""
    cost: str
    """"" where it was not measured."""

    @classmethod
    def of(cls, tables: Mapping[str, pd.DataFrame]) -> Self | None:
        """From a run's tables; None where they hold no false alarms."""
        table = tables["detection"]
        names = list(dict.fromkeys(table["detector"]))
        fused = table[table["detector"] == FUSED] if FUSED in names else table
        # Of the rates that were claimed the largest was asked for; a smaller one comes along.
        fused = fused[fused["rate"] == fused.loc[fused["metric"] == "fpr", "rate"].max()]
        if fused.empty:
            return None
        false = _by_rows(fused[fused["metric"] == "fpr"])
        promised = promised_rows(fused)
        kinds = [name for name in false if name.startswith("fresh:")] or [promised]
        answers, overhead = tables.get("detection_answers"), tables.get("detection_overhead")
        watched = {} if answers is None else _by_rows(answers[answers["watched"] == "both"])
        cost = ""
        if overhead is not None and not overhead.empty:
            alone, batch = overhead.iloc[0], overhead.iloc[-1]
            cost = (
                f"answers of {alone['new_tokens']:.0f} tokens take {alone['ratio']:.2f} times as long one at "
                f"a time, {batch['ratio']:.2f} in batches of {batch['batch']:.0f}"
            )
            if "passes" in overhead:  # not in tables of earlier versions
                cost += f"; watching a prompt adds {batch['passes']:.1f} passes over it"
        return cls(
            tuple(name for name in names if name != FUSED and not name.startswith("skyline ")),
            float(fused["rate"].iloc[0]),
            tuple(_caught(_by_rows(fused[fused["metric"] == "tpr"]))),
            tuple(_worst_of_each(false)),
            tuple(false[name] for name in kinds),
            next(iter(_by_rows(fused[fused["metric"] == "fpr_worst"]).values())),
            tuple(watched[rows] for rows in ("fired", "fresh") if rows in watched),
            cost,
        )

    @property
    def kept(self) -> bool:
        """Whether fresh prompts do not speak against the named rate."""
        return all(alarms.low <= self.rate for alarms in self.fresh)

    @property
    def blind_spots(self) -> str:
        """What it cannot see."""
        if len(self.detectors) > FEW:
            spots = [f"what none of its {len(self.detectors)} detectors finds unusual"]
        else:
            names = [name if name in BLIND_SPOTS else name.partition(":")[0] for name in self.detectors]
            spots = [BLIND_SPOTS.get(name, f"what {name} finds usual") for name in dict.fromkeys(names)]
        return "; ".join([*spots, "a backdoor that was trained to hide from it"])

    def sections(self) -> list[tuple[str, list[str]]]:
        """Heading and lines, in the order in which one asks."""
        panel = self.detectors if len(self.detectors) <= FEW else (f"{len(self.detectors)} detectors, fused",)
        rates = {"Caught": self.caught, "False alarms": self.false}
        rates["Rate kept" if self.kept else "Rate broken"] = self.fresh
        rates |= {"With answers": self.answers} if self.answers else {}
        return [
            ("Monitor", [f"{', '.join(panel)}; named false-positive rate {100 * self.rate:g}%"]),
            ("", ["Share of prompts that raise an alarm, with its 95% interval:"]),
            *(
                (heading, [f"{a.text:<29} {a.label}" for a in some] or [UNKNOWN])
                for heading, some in rates.items()
            ),
            ("Blind to", [self.blind_spots]),
            *([("Cost", [self.cost])] if self.cost else []),
        ]


def _by_rows(table: pd.DataFrame) -> dict[str, Alarms]:
    names = dict((*CAUGHT, *KINDS_OF_PROMPTS))
    alarms: dict[str, Alarms] = {}
    for row in table.itertuples():
        name, _, group = row.rows.partition(":")
        label = names.get(name, name) + (f", {group}" if group else "")
        alarms[row.rows] = Alarms(label, row.value, row.low, row.high, int(row.n))
    return alarms


def _caught(rates: Mapping[str, Alarms]) -> Iterator[Alarms]:
    for rows, _ in CAUGHT:
        if rows in rates and not (rows == "triggered" and "fired" in rates):
            yield rates[rows]
            if forms := _groups(rates, rows):
                least = min(forms, key=lambda alarms: alarms.value)
                yield least._replace(label=f"{least.label} (least of {len(forms)} forms)")


def _worst_of_each(rates: Mapping[str, Alarms]) -> Iterator[Alarms]:
    for rows, _ in KINDS_OF_PROMPTS[1:]:
        if rows in rates:
            yield rates[rows]
        groups = _groups(rates, rows)
        worst = max(groups, key=lambda alarms: alarms.value, default=None)
        if worst is not None and (rows not in rates or worst.value > rates[rows].value):
            yield worst._replace(label=f"{worst.label} (worst of {len(groups)})")


def _groups(rates: Mapping[str, Alarms], rows: str) -> list[Alarms]:
    return [alarms for name, alarms in rates.items() if name.startswith(f"{rows}:")]
