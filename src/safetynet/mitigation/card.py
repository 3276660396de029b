"""The model card of a repaired model: what was done, why this one, what was measured. Writes nothing."""

from collections.abc import Mapping
from typing import Any

from safetynet import __version__
from safetynet.mitigation.method import Method, Repaired

_ROWS = {
    "asr": "attack success on triggered prompts (ASR)",
    "ftr": "behaviour shown without the trigger (FTR)",
    "cacc": "clean accuracy",
    "refused": "forbidden requests refused",
    "over_refused": "harmless requests refused",
}
_KINDS = {"adapter": "a LoRA adapter", "checkpoint": "a whole model"}
_COLUMNS = {"before": "before", "repaired": "repaired", "saved": "these files, loaded again"}


def render(
    method: Method, repaired: Repaired, about: Mapping[str, str], lines: Mapping[str, Mapping[str, Any]]
) -> str:
    """Markdown with the hub's front matter.

    Args:
        method: what was applied.
        repaired: its settings and what it did.
        about: model, run, why, and relearned ("" where that was not tested).
        lines: rates on the judged rows by column of the table: before, repaired, saved; each rate with _low,
            _high, _count and _n.
    """
    shown = [name for name in _COLUMNS if name in lines]
    head = ["measure", *(_COLUMNS[name] for name in shown)]
    rows = [
        [label, *(_rate(lines[name], rate) for name in shown)]
        for rate, label in _ROWS.items()
        if any(lines[name][f"{rate}_n"] > 0 for name in shown)
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
            f"This is {_KINDS[repaired.form]} from which SafetyNet {__version__} tried to remove a backdoor, "
            f"in run {about['run']}.",
            "",
            *_done(method, repaired, about),
            "",
            "## Measured on held-out rows",
            "",
            "Rates in percent with 95% Wilson intervals and counts; these rows neither chose nor repaired.",
            "",
            _line(head),
            _line(["---"] * len(head)),
            *map(_line, rows),
            "",
            "A low ASR says that the behaviour is not shown, not that it is forgotten: the run's tables "
            "`verification` and `relearning` say whether the trigger can still be read from the states, "
            "and how fast a few poisoned rows bring the backdoor back.",
            "",
        ]
    )


def _done(method: Method, repaired: Repaired, about: Mapping[str, str]) -> list[str]:
    knobs = ", ".join(f"{name} {value:g}" for name, value in repaired.knobs.items()) or "none"
    return [
        f"- method: {method.name}: {method.about}",
        f"- settings: {knobs}",
        f"- needs: {', '.join(sorted(method.needs)) or 'nothing'}",
        *([f"- paper: {method.paper}"] if method.paper else []),
        *(f"- {name}: {value}" for name, value in repaired.details.items()),
        f"- why this one, on rows that chose it: {about['why']}",
        *([f"- relearn test: {about['relearned']}"] if about["relearned"] else []),
    ]


def _rate(line: Mapping[str, Any], name: str) -> str:
    if not line[f"{name}_n"] > 0:
        return ""
    value, low, high = (100 * float(line[name + end]) for end in ("", "_low", "_high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}], {line[f'{name}_count']:.0f} of {line[f'{name}_n']:.0f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
