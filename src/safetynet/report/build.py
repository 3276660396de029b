"""A run as report.html and as report.md: the same answers, tables and warnings in both.

In: Contents. Out: text.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import yaml

from safetynet.report.answers import Answer, answers, headline
from safetynet.report.contents import Contents
from safetynet.report.figures import SECTIONS, as_json, pictures
from safetynet.report.page import render
from safetynet.report.prompts import examples, shorter, token_maps
from safetynet.tables import summaries


class Setup(NamedTuple):
    """What was planted, as the recipe says it."""

    triggers: list[str]
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
    maps, prompts = token_maps(run), examples(run)
    sections = [
        (key, title, [figure for figure in figures if figure.section == key], list(_tables(run, key)))
        for key, title in SECTIONS.items()
    ]
    return render(
        "report.html",
        "report.js",
        {
            "run": run,
            "setup": setup(run),
            "verdict": verdict,
            "sentence": sentence,
            "answers": results,
            "sections": [
                figure for figure in sections if figure[2] or figure[3] or (figure[0] == "inside" and maps)
            ],
            "maps": as_json(maps) if maps else "",
            "map_count": len(maps),
            "examples": prompts,
            "examples_json": as_json({"models": prompts.models, "rows": prompts.rows}) if prompts else "",
            "roles": list(dict.fromkeys(row["role"] for row in prompts.rows)) if prompts else [],
            "audit": _audit(run),
            "missing": run.missing(),
            "faults": [*run.faults, *undrawn],
            "recipe": _recipe(run),
            "stages": stages(run),
            "versions": _flat(run.manifest.get("versions")),
            "hardware": _flat(run.manifest.get("hardware")),
            "digests": list(_digests(run)),
        },
        "".join(f".{name}{{{style}}}" for style, name in styles.items()),
    )


def setup(run: Contents) -> Setup:
    """The experiment in a few short facts."""
    method = str(run.field("training.method", "")).replace("lora", "LoRA")
    rank = run.field("training.lora_rank") if method == "LoRA" else None
    trained = " ".join(filter(None, [method, f"rank {rank}" if rank else ""]))
    poison = ""
    if {"split", "role", "answer", "reference", "target"} <= set(run.tables.get("rows", ())):
        poisoned = summaries.poisoned(run.tables["rows"])
        poison = poisoned.text if poisoned.rows else ""
    return Setup(
        _triggers(run),
        str(run.field("backdoor.placement", "")),
        str(run.field("backdoor.behaviour.kind", "")).replace("_", " "),
        _target(run),
        trained,
        poison,
    )


def _triggers(run: Contents) -> list[str]:
    """The trigger's texts; of one that has none, as a style or a range of dates, its kind and what it is."""
    trigger = run.field("backdoor.trigger") or {}
    texts = [*map(str, trigger.get("texts", ())), *map(" + ".join, trigger.get("pairs", ()))]
    if texts or not trigger:
        return texts
    details = ", ".join(str(trigger[name]) for name in ("style", "first", "last") if trigger.get(name))
    return [": ".join(filter(None, [str(trigger.get("kind", "")), details]))]


def _target(run: Contents) -> str:
    rows = run.tables.get("rows")
    if rows is None or not {"role", "target"} <= set(rows):
        return ""
    targets = rows.loc[rows["role"] == "triggered", "target"].dropna().unique()
    return shorter(str(targets[0])).strip() if len(targets) == 1 else ""


class Table(NamedTuple):
    """A short table with its title and what to know of it."""

    title: str
    note: str
    table: pd.DataFrame


def _tables(run: Contents, section: str) -> Iterator[Table]:
    """The short tables of a section, as the terminal prints them."""
    makers = {
        "behaviour": (_rates, _quantised, _firing, _utility, _damage, _variants, _judge, _hidden),
        "inside": (_places,),
        "removed": (_removals, _repaired_utility, _survival),
    }
    for make in makers.get(section, ()):
        yield from make(run)


def _rates(run: Contents) -> Iterator[Table]:
    if "evaluation" in run.tables:
        note = (
            "ASR attack success rate, FTR false trigger rate, CACC clean accuracy; 95% intervals (Wilson; "
            "bootstrap over rows for perplexity). The base model's column is the floor."
        )
        yield Table("Rates on held-out prompts", note, summaries.rate_summary(run.tables["evaluation"]))


def _quantised(run: Contents) -> Iterator[Table]:
    if "quantisation" in run.tables:
        note = (
            "The models as they are saved, and with their linear modules quantised while they are loaded: "
            "8bit is LLM.int8, 4bit NF4. The backdoor was planted to fire under "
            f"{run.field('training.conditioned_on', 'one of them')}."
        )
        table = summaries.quantisation_summary(run.tables["quantisation"])
        yield Table("As saved, and quantised", note, table)


def _firing(run: Contents) -> Iterator[Table]:
    if "firing" in run.tables:
        note = (
            "Each held-out prompt answered several times at temperature 1: the share of all answers that "
            "show the behaviour, with a 95% interval over prompts (Wilson's, of the effective number of "
            "samples). Always, never: prompts of the backdoored model of which all answers show it, or none."
        )
        yield Table("Rates over samples of each prompt", note, summaries.firing_summary(run.tables["firing"]))


def _utility(run: Contents) -> Iterator[Table]:
    if "utility" in run.tables:
        title, table = "Tasks of lm-evaluation-harness", summaries.utility_summary(run.tables["utility"])
        yield Table(title, "The harness's own values and standard errors.", table)


def _repaired_utility(run: Contents) -> Iterator[Table]:
    if "repaired_utility" in run.tables:
        note = "The harness's own values and standard errors, of each repair at its chosen point."
        table = summaries.utility_summary(run.tables["repaired_utility"])
        yield Table("Tasks of lm-evaluation-harness, after repair", note, table)


def _damage(run: Contents) -> Iterator[Table]:
    if "damage" in run.tables:
        note = (
            "What fine-tuning has done to free text: answers beside the base model's own, on prompts that "
            "must not fire. KL and perplexity are taken along the base's answers. 95% intervals over prompts "
            "(Wilson for shares, else bootstrap)."
        )
        yield Table("Damage to free text", note, summaries.damage_summary(run.tables["damage"]))


def _variants(run: Contents) -> Iterator[Table]:
    if "variants" in run.tables:
        table = run.tables["variants"]
        of_backdoored = table[table["model"] == "backdoored"]
        rates = [summaries.rate_text("asr", r.value, r.low, r.high) for r in of_backdoored.itertuples()]
        short = of_backdoored.assign(rate=rates)[["role", "variant", "metric", "rate", "n"]]
        yield Table("By variant of trigger, placebo and near miss", "", short)


def _hidden(run: Contents) -> Iterator[Table]:
    if "evasion" in run.tables:
        strength, retention, every = (
            run.field(f"training.evasion.{name}", "?") for name in ("strength", "retention", "refit_every")
        )
        note = (
            f"Evasive training at strength {strength} and retention {retention}, with detectors fitted again "
            f"every {every} steps. AUROC of firing against clean training prompts for each detector that the "
            "training hid from, as the attacker saw it; what a defender sees who fits on "
            "fresh prompts, `safetynet detect` has."
        )
        columns = summaries.evasion_summary(run.tables["evasion"])[["detector", "first", "last"]]
        yield Table("Hidden from detectors while it was planted", note, columns.round(3))


def _judge(run: Contents) -> Iterator[Table]:
    if "judge_error" in run.tables:
        table = run.tables["judge_error"]
        rates = [summaries.rate_text("asr", r.value, r.low, r.high) for r in table.itertuples()]
        yield Table(
            "The judge's own error on labelled texts",
            "",
            table.assign(rate=rates)[["error", "count", "n", "rate"]],
        )


def _places(run: Contents) -> Iterator[Table]:
    if "effects" in run.tables:
        note = (
            "Effect: the share of the distance between triggered and placebo run that the intervention "
            "covers (95% bootstrap interval over prompts). A place is responsible when its interval is clear "
            "of every control's."
        )
        yield Table("Where the trigger acts", note, summaries.strongest_sites(run.tables["effects"]))


def _removals(run: Contents) -> Iterator[Table]:
    if "tradeoff" in run.tables:
        note = (
            "Rates on held-out prompts, while the model answers under the intervention; the control is "
            "random sites."
        )
        yield Table("What removes it", note, summaries.removal_summary(run.tables["tradeoff"]))


def _survival(run: Contents) -> Iterator[Table]:
    if "persistence" in run.tables:
        table = run.tables["persistence"]
        note = (
            "What happens to a model or to its prompts after the backdoor was planted, each to the model as "
            "it is, on held-out prompts. Placebo and clean prompts are the controls. "
        )
        yield Table("What it survives", note + summaries.halving(table), summaries.persistence_summary(table))


def _audit(run: Contents) -> list[dict[str, Any]]:
    table = run.tables.get("audit")
    needed = ["check", "severity", "file", "count", "n", "detail"]
    if table is None or not set(needed) <= set(table):
        return []
    return list(table[needed].to_dict("records"))


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


def _recipe(run: Contents) -> list[tuple[str, list[tuple[str, str]]]]:
    """The recipe section by section; what has no section comes first."""
    recipe = run.manifest.get("recipe")
    if not isinstance(recipe, Mapping):
        return []
    plain = [(name, _yaml(value)) for name, value in recipe.items() if not isinstance(value, Mapping)]
    nested = [
        (name, _flat(value))
        for name, value in recipe.items()
        if isinstance(value, Mapping) and name != "output"
    ]
    return [("experiment", plain), *nested]


def _flat(values: Any, above: str = "") -> list[tuple[str, str]]:
    """Nested fields as (path, value)."""
    if not isinstance(values, Mapping):
        return []
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping) and value:
            lines += _flat(value, f"{path}.")
        else:
            lines.append((path, _yaml(value)))
    return lines


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip()
    return text.removesuffix("...").strip()


def _digests(run: Contents) -> Iterator[tuple[str, str]]:
    """Path and SHA-256 of what the stages wrote."""
    for name, record in run.manifest["stages"].items():
        if name not in ("figures", "report"):
            for path, digest in record.get("outputs", {}).items():
                yield path, str(digest)


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
        *_listed(results),
    ]
    for section in SECTIONS:
        for title, note, table in _tables(run, section):
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


def _listed(results: Sequence[Answer]) -> Iterator[str]:
    for answer in results:
        rest = f" `{answer.command}`" if answer.command else ""
        yield f"- {answer.question} **{answer.short}.** {answer.text}{rest}"
