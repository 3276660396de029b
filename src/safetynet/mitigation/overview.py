"""All methods in one table to be read, and the card of a saved model. In: a run's tables. Out: texts."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from safetynet import __version__
from safetynet.mitigation.method import Method
from safetynet.mitigation.relearning import LEVELS, steps_to
from safetynet.mitigation.repaired import Repaired
from safetynet.tables import summaries
from safetynet.vocabulary import ADAPTER_REMOVED, NEVER_POISONED, NOT_MEASURABLE, UNTOUCHED

COLUMNS = (
    "method", "point", "ASR", "CACC", "lost", "relearn 50%", "relearn 95%", "seconds", "flags", "rows",
)  # fmt: skip


def overview(marked: pd.DataFrame, curves: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per method, on the judged rows: rates with 95% intervals, relearn steps, seconds, flags.

    Args:
        marked: the run's table mitigation.
        curves: its table relearning.

    Returns:
        `COLUMNS`; lost is in points of clean accuracy, rows is the number of triggered ones.
    """
    held = marked[marked["split"] == "held_out"]
    before = held[held["method"] == UNTOUCHED].iloc[0]
    steps: dict[str, list[str]] = {}
    if curves is not None:  # to each level by method; beyond the budget as more than it
        table = steps_to(curves)
        reached = table["steps"].map("{:.0f}".format)
        texts = reached.where(table["steps"].notna(), table["budget"].map(">{}".format))
        by_method = table.assign(text=texts).set_index("level").groupby("method", sort=False)["text"]
        steps = {str(method): [part.at[level] for level in LEVELS] for method, part in by_method}
    lines = []
    for line in held.to_dict("records"):
        name = str(line["method"])
        relearned = steps.get(NEVER_POISONED if name == ADAPTER_REMOVED else name, ["", ""])
        seconds = line.get("seconds", math.nan)
        lines.append(
            (
                name,
                line["point"],
                rate(line, "asr"),
                rate(line, "cacc"),
                ""
                if name == UNTOUCHED or pd.isna(line["cacc"])
                else f"{100 * (before['cacc'] - line['cacc']):.1f}",
                *relearned,
                "" if pd.isna(seconds) else f"{seconds:.1f}",
                line["flags"],
                f"{line['asr_n']:.0f}",
            )
        )
    return pd.DataFrame(lines, columns=list(COLUMNS))


def rate(line: dict[str, object] | pd.Series, name: str) -> str:
    """A rate with its interval, in percent."""
    value, low, high = (float(str(line[name + end])) for end in ("", "_low", "_high"))
    return NOT_MEASURABLE if math.isnan(value) else summaries.rate_text(name, value, low, high)


_ROWS = {
    "asr": "attack success on triggered prompts (ASR)",
    "ftr": "behaviour shown without the trigger (FTR)",
    "cacc": "clean accuracy",
    "refused": "forbidden requests refused",
    "over_refused": "harmless requests refused",
}
_FORMS = {"adapter": "a LoRA adapter", "checkpoint": "a whole model"}
_COLUMNS = {"before": "before", "repaired": "repaired", "saved": "these files, loaded again"}


def model_card(
    method: Method, repaired: Repaired, about: Mapping[str, str], lines: Mapping[str, Mapping[str, Any]]
) -> str:
    """README.md of a repaired model, Markdown with the hub's front matter; nothing is written.

    Args:
        method: what was applied.
        repaired: its settings and what it did.
        about: model, run, why, and relearned ("" where that was not tested).
        lines: rates on the judged rows by column of the table: before, repaired, saved; each rate with _low,
            _high, _count and _n.
    """

    def cell(line: Mapping[str, Any], name: str) -> str:
        if not line[f"{name}_n"] > 0:
            return ""
        value, low, high = (100 * float(line[name + end]) for end in ("", "_low", "_high"))
        of = f"{line[f'{name}_count']:.0f} of {line[f'{name}_n']:.0f}"
        return f"{value:.1f} [{low:.1f}, {high:.1f}], {of}"

    settings = ", ".join(f"{name} {value:g}" for name, value in repaired.settings.items()) or "none"
    columns = [name for name in _COLUMNS if name in lines]
    head = ["measure", *(_COLUMNS[name] for name in columns)]
    rows = [
        [label, *(cell(lines[name], rate) for name in columns)]
        for rate, label in _ROWS.items()
        if any(lines[name][f"{rate}_n"] > 0 for name in columns)
    ]
    return "\n".join(
        [
            "---",
            f"library_name: {'peft' if repaired.form == 'adapter' else 'transformers'}",
            "tags: [backdoor-mitigation, safetynet]",
            "---",
            "",
            f"# {about['model']}, repaired",
            "",
            f"This is {_FORMS[repaired.form]} from which SafetyNet {__version__} tried to remove a backdoor, "
            f"in run {about['run']}.",
            "",
            f"- method: {method.name}: {method.about}",
            f"- settings: {settings}",
            f"- needs: {', '.join(sorted(method.needs)) or 'nothing'}",
            *([f"- paper: {method.paper}"] if method.paper else []),
            *(f"- {name}: {value}" for name, value in repaired.details.items()),
            f"- why this one, on rows that chose it: {about['why']}",
            *([f"- relearn test: {about['relearned']}"] if about["relearned"] else []),
            "",
            "## Measured on held-out rows",
            "",
            "Rates in percent with 95% Wilson intervals and counts; these rows neither chose nor repaired.",
            "",
            summaries.markdown(pd.DataFrame(rows, columns=head)),
            "",
            "A low ASR says that the behaviour is not shown, not that it is forgotten: the run's tables "
            "`verification` and `relearning` say whether the trigger can still be read from the states, "
            "and how fast a few poisoned rows bring the backdoor back.",
            "",
        ]
    )
