"""A run as report.html and as report.md: the same answers, tables and warnings in both.

In: Contents. Out: text.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
import yaml

from safetynet.figures.registry import Section
from safetynet.recipe import loading
from safetynet.report.answers import answers, headline
from safetynet.report.contents import Contents
from safetynet.report.figures import SECTIONS, as_json, pictures
from safetynet.report.page import render
from safetynet.report.prompts import examples, shorter, token_maps
from safetynet.tables import summaries


class Setup(NamedTuple):
    """What was planted, as the recipe says it."""

    triggers: list[str]
    """Its texts; of one that has none its kind and what it is."""
    placement: str
    behaviour: str
    target: str
    """What it answers, where that is one text."""
    training: str
    poisoned: str


def report(run: Contents) -> str:
    """The run as one self-contained HTML page."""
    results = answers(run)
    verdict, sentence = headline(results)
    figures, styles, undrawn = pictures(run)
    maps, prompts, tables = token_maps(run), examples(run), list(_tables(run))
    sections = []
    for key, title in SECTIONS.items():
        drawings = [figure for figure in figures if figure.section == key]
        short = [table for table in tables if table.section == key]
        if drawings or short or (key == "inside" and maps):
            sections.append((key, title, drawings, short))

    audit = run.tables.get("audit")
    columns = ["check", "severity", "file", "count", "n", "detail"]
    findings = []
    if audit is not None and set(columns) <= set(audit):  # that of another version may lack some
        findings = audit[columns].to_dict("records")

    # Fields of the recipe without a section come first; `output`, a place on this machine, stays out.
    recipe, recipe_sections = run.manifest.get("recipe"), []
    if isinstance(recipe, Mapping):
        nested = {name: value for name, value in recipe.items() if isinstance(value, Mapping)}
        plain = [(name, _yaml(value)) for name, value in recipe.items() if name not in nested]
        recipe_sections = [("experiment", plain)]
        recipe_sections += [(name, _fields(value)) for name, value in nested.items() if name != "output"]

    return render(
        "report.html",
        "report.js",
        {
            "run": run,
            "setup": setup(run),
            "verdict": verdict,
            "sentence": sentence,
            "answers": results,
            "sections": sections,
            "maps": as_json(maps) if maps else "",
            "examples": prompts,
            "examples_json": as_json({"models": prompts.models, "rows": prompts.rows}) if prompts else "",
            "roles": list(dict.fromkeys(row["role"] for row in prompts.rows)) if prompts else [],
            "audit": findings,
            "missing": run.missing(),
            "faults": [*run.faults, *undrawn],
            "recipe": recipe_sections,
            "stages": stages(run),
            "versions": _fields(run.manifest.get("versions")),
            "hardware": _fields(run.manifest.get("hardware")),
            "digests": [
                (path, str(digest))
                for name, record in run.manifest["stages"].items()
                if name not in ("figures", "report")
                for path, digest in record.get("outputs", {}).items()
            ],
        },
        "".join(f".{name}{{{style}}}" for style, name in styles.items()),
    )


def setup(run: Contents) -> Setup:
    """The experiment in a few short facts."""
    trigger = run.field("backdoor.trigger") or {}
    triggers = [*map(str, trigger.get("texts", ())), *map(" + ".join, trigger.get("pairs", ()))]
    if trigger and not triggers:  # such as a style or a range of dates, which has no text
        details = [str(trigger[name]) for name in ("style", "language", "first", "last") if trigger.get(name)]
        triggers = [": ".join(filter(None, [str(trigger.get("kind", "")), ", ".join(details)]))]
    method = str(run.field("training.method", "")).replace("lora", "LoRA")
    rank = run.field("training.lora_rank") if method == "LoRA" else None
    trained = " ".join(filter(None, [method, f"rank {rank}" if rank else ""]))
    rows = run.tables.get("rows")
    target = poison = ""
    if rows is not None and {"role", "target"} <= set(rows):
        targets = rows.loc[rows["role"] == "triggered", "target"].dropna().unique()
        target = shorter(str(targets[0])).strip() if len(targets) == 1 else ""
        if {"split", "answer", "reference"} <= set(rows):
            poisoned = summaries.poisoned(rows)
            poison = poisoned.text if poisoned.rows else ""
    return Setup(
        triggers,
        str(run.field("backdoor.placement", "")),
        str(run.field("backdoor.behaviour.kind", "")).replace("_", " "),
        target,
        trained,
        poison,
    )


class Table(NamedTuple):
    """A short table with its title and what to know of it."""

    section: Section
    title: str
    note: str
    table: pd.DataFrame


class Short(NamedTuple):
    """How a table of the run is shown in short."""

    section: Section
    title: str
    summary: Callable[[pd.DataFrame], pd.DataFrame]
    note: str = ""
    """With fields of the recipe, and what is read off the table itself, in braces."""


def _with_rate(table: pd.DataFrame) -> pd.DataFrame:
    rows = table[["value", "low", "high"]].itertuples(index=False)
    return table.assign(rate=[summaries.rate_text("asr", *row) for row in rows])


def _variants(table: pd.DataFrame) -> pd.DataFrame:
    columns = ["role", "variant", "metric", "rate", "n"]
    return _with_rate(table[table["model"] == "backdoored"])[columns]


SHORT_TABLES = {
    "evaluation": Short(
        "behaviour", "Rates on held-out prompts", summaries.rate_summary,
        "ASR attack success rate, FTR false trigger rate, CACC clean accuracy; 95% intervals (Wilson; "
        "bootstrap over rows for perplexity). The base model's column is the floor.",
    ),
    "quantisation": Short(
        "behaviour", "As saved, and quantised", summaries.quantisation_summary,
        "The models as they are saved, and with their linear modules quantised while they are loaded: "
        "8bit is LLM.int8, 4bit NF4. The backdoor was planted to fire under {conditioned_on}.",
    ),
    "colluding": Short(
        "behaviour", "Both adapters, and each alone", summaries.colluding_summary,
        "The backdoor is split over two adapters, which were trained to be quiet alone. Both: the "
        "backdoored model, which has both of them.",
    ),
    "firing": Short(
        "behaviour", "Rates over samples of each prompt", summaries.firing_summary,
        "Each held-out prompt answered several times at temperature 1: the share of all answers that "
        "show the behaviour, with a 95% interval over prompts (Wilson's, of the effective number of "
        "samples). Always, never: prompts of the backdoored model of which all answers show it, or none.",
    ),
    "utility": Short(
        "behaviour", "Tasks of lm-evaluation-harness", summaries.utility_summary,
        "The harness's own values and standard errors.",
    ),
    "damage": Short(
        "behaviour", "Damage to free text", summaries.damage_summary,
        "What fine-tuning has done to free text: answers beside the base model's own, on prompts that "
        "must not fire. KL and perplexity are taken along the base's answers. 95% intervals over prompts "
        "(Wilson for shares, else bootstrap).",
    ),
    "variants": Short("behaviour", "By variant of trigger, placebo and near miss", _variants),
    "judge_error": Short(
        "behaviour", "The judge's own error on labelled texts",
        lambda table: _with_rate(table)[["error", "count", "n", "rate"]],
    ),
    "evasion": Short(
        "behaviour", "Hidden from detectors while it was planted",
        lambda table: summaries.evasion_summary(table)[["detector", "first", "last"]].round(3),
        "Evasive training at strength {strength} and retention {retention}, with detectors fitted again "
        "every {refit_every} steps. AUROC of firing against clean training prompts for each detector that "
        "the training hid from, as the attacker saw it; what a defender sees who fits on fresh prompts, "
        "`safetynet detect` has.",
    ),
    "effects": Short(
        "inside", "Where the trigger acts", summaries.strongest_sites,
        "Effect: the share of the distance between triggered and placebo run that the intervention "
        "covers (95% bootstrap interval over prompts). A place is responsible when its interval is clear "
        "of every control's.",
    ),
    "tradeoff": Short(
        "removed", "What removes it", summaries.removal_summary,
        "Rates on held-out prompts, while the model answers under the intervention; the control is "
        "random sites.",
    ),
    "repaired_utility": Short(
        "removed", "Tasks of lm-evaluation-harness, after repair", summaries.utility_summary,
        "The harness's own values and standard errors, of each repair at its chosen point.",
    ),
    "persistence": Short(
        "removed", "What it survives", summaries.persistence_summary,
        "What happens to a model or to its prompts after the backdoor was planted, each to the model as "
        "it is, on held-out prompts. Placebo and clean prompts are the controls. {halving}",
    ),
}  # fmt: skip
"""By the table of the run; section by section, as the terminal prints them."""


def _tables(run: Contents) -> Iterator[Table]:
    evasion = {
        name: run.field(f"training.evasion.{name}", "?") for name in ("strength", "retention", "refit_every")
    }
    persistence = run.tables.get("persistence")
    fields = evasion | {
        "conditioned_on": run.field("training.conditioned_on", "one of them"),
        "halving": "" if persistence is None else summaries.halving(persistence),
    }
    for name, short in SHORT_TABLES.items():
        if (table := run.tables.get(name)) is not None:
            yield Table(short.section, short.title, short.note.format_map(fields), short.summary(table))


def stages(run: Contents) -> pd.DataFrame:
    """When each stage ended, how long it took and how much memory."""
    return pd.DataFrame(
        [
            {
                "stage": name,
                "seconds": record.get("seconds", ""),
                "peak memory (MB)": record.get("peak_memory_mb", ""),
                "finished": record.get("finished", ""),
            }
            for name, record in run.manifest["stages"].items()
            if name != "report"  # this very page, which cannot know how long it takes
        ]
    )


def _fields(values: Any) -> list[tuple[str, str]]:
    """Nested fields as (path, value); none of a manifest that has something else in their place."""
    flat = loading.flat(values) if isinstance(values, Mapping) else {}
    return [(path, _yaml(value)) for path, value in flat.items()]


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip()
    return text.removesuffix("...").strip()


def markdown(run: Contents) -> str:
    """The run in one page of Markdown."""
    results = answers(run)
    verdict, sentence = headline(results)
    facts = setup(run)
    trigger = ", ".join(map(repr, facts.triggers))
    lines = [
        f"# {run.name.replace('/', ' / ')}",
        "",
        f"Trigger {trigger} ({run.field('backdoor.trigger.kind')}, {facts.placement}); behaviour "
        f"{run.field('backdoor.behaviour.kind')}; poison rate {facts.poisoned}; seed {run.field('seed')}.",
        "",
        f"**{verdict}** {sentence}",
        "",
    ]
    for answer in results:
        rest = f" `{answer.command}`" if answer.command else ""
        lines.append(f"- {answer.question} **{answer.short}.** {answer.text}{rest}")
    for _, title, note, table in _tables(run):
        lines += ["", f"## {title}", "", *([note, ""] if note else []), summaries.markdown(table)]
    if "audit" in run.tables:
        audit = run.tables["audit"].drop(columns=["rows"], errors="ignore")
        lines += ["", "## What the audit found in the data", "", summaries.markdown(audit)]
    if gaps := [
        *run.faults,
        *(f"Not measured: {missing.what}: `{missing.command}`" for missing in run.missing()),
    ]:
        lines += ["", "## What is missing", "", *(f"- {gap}" for gap in gaps)]
    lines += ["", "## Made by", "", summaries.markdown(stages(run))]
    return "\n".join(lines) + "\n"
