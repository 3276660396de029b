"""Chat templates of a suspect, beside its base's: what changed, and what depends on what a message says.

In: the folders of a suspect and its base. Out: findings. Templates are parsed and never rendered.

A backdoor may stand in the template and in no weight: a condition on a message's text that puts an
instruction before the model (arXiv 2602.04653).

Rules: `template-condition`, `template-conditions`, `template-changed`, `template-conflict`,
`template-escape`, `template-include`, `template-unparsed`, `template-unreadable`.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetynet.scan.folder import headers
from safetynet.scan.folder.reading import UnreadableError, entries, escaped, finding, json_of, text_of
from safetynet.scan.result import Finding, Level
from safetynet.scan.templates.conditions import Analysis, analyse
from safetynet.scan.templates.values import Dependence, UnparsedError, natural

DEFAULT = "default"
JSON_FILES = (
    "tokenizer_config.json", "chat_template.json", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
"""Files whose field `chat_template` software reads."""
FOLDER = "additional_chat_templates/"
LONGEST_DIFF, LONGEST_LINE, MOST_LINES = 120, 300, 4000
MOST_TEXTS = 8
ASKS = {
    "text": "asks whether a message says {literals}",
    "length": "asks how long a message is or what it looks like",
    "date": "asks for the date",
    "count": "asks how many messages there are",
    "chance": "draws at random",
}
"""What a condition does, in words."""


@dataclass(frozen=True)
class Template:
    """A chat template and where it stands."""

    name: str
    """`default`, or the name under which software finds it, such as `tool_use`."""
    file: str
    """Relative to the folder."""
    text: str

    @property
    def where(self) -> str:
        """File and name, for people."""
        return self.file if self.name == DEFAULT else f"{self.file} ({escaped(self.name, 60)})"

    @property
    def is_file(self) -> bool:
        """Whether the file holds nothing else, so that its lines are the template's."""
        return self.file.endswith(".jinja")


def check(suspect: Path, base: Path | None = None) -> tuple[Finding, ...]:
    """Findings of a suspect's chat templates.

    Args:
        suspect: folder of an adapter or a model.
        base: folder of its base; None where it is not known, and nothing is compared.

    Returns:
        `template-condition`: `error` for a condition on words that people type or on the date; `warning` for
        one on markup, length, number or chance that writes natural words; `note` where the base's template
        has the same.

    Raises:
        InputError: as `reading.entries`.
    """
    templates, findings = read(suspect)
    base_templates = read(base)[0] if base is not None else ()
    of_base = list[Analysis]()
    for template in base_templates:
        with suppress(UnparsedError):  # the suspect's own is reported
            of_base.append(analyse(template.text))
    in_base = {_key(each) for analysis in of_base for each in analysis.dependences}
    for template in templates:
        findings += _findings(template, in_base)
        if base is not None:
            findings += _compared(template, base_templates, of_base)
    conflicts = _conflicts(templates)
    if base is None or conflicts != _conflicts(base_templates):
        for name in conflicts:
            files = [each.file for each in templates if each.name == name]
            message = (
                f"{', '.join(map(escaped, files))} hold different chat templates under one name "
                f"({escaped(name, 60)}). Which of them is used depends on the software. Delete all but one."
            )
            findings.append(finding("template-conflict", "warning", message, escaped(files[0])))
    return tuple(findings)


def read(folder: Path) -> tuple[tuple[Template, ...], list[Finding]]:
    """Every chat template of a folder, wherever it stands, and a finding for each file that cannot be read.

    Raises:
        InputError: as `reading.entries`.
    """
    templates, findings = list[Template](), list[Finding]()
    for entry in entries(folder):
        if entry.leaves:
            continue
        file = entry.name
        try:
            if file in JSON_FILES:
                fields, twice = json_of(entry.path)
                if "chat_template" in twice:
                    raise UnreadableError(
                        "it gives chat_template twice, and software differs in which it takes"
                    )
                texts = list(_named(fields.get("chat_template")))
            elif file == "chat_template.jinja":
                texts = [(DEFAULT, text_of(entry.path))]
            elif file.endswith((".jinja", ".jinja2", ".j2")):
                texts = [(file.removeprefix(FOLDER).rpartition(".")[0], text_of(entry.path))]
            elif file.endswith(".gguf"):
                texts = list(headers.chat_templates(entry.path).items())
            else:
                continue
        except UnreadableError as error:
            message = (
                f"It may hold a chat template and cannot be read: {escaped(str(error))}. Read it by hand."
            )
            findings.append(finding("template-unreadable", "warning", message, escaped(file)))
            continue
        templates += [Template(name, file, text) for name, text in texts]
    return tuple(templates), findings


def _named(value: Any) -> Iterator[tuple[str, str]]:
    """Names and texts of a field `chat_template`: a text, or a list or an object of named ones."""
    if value is None:
        return
    if isinstance(value, str):
        yield DEFAULT, value
        return
    pairs = [*value.items()] if isinstance(value, dict) else None
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        pairs = [(each.get("name"), each.get("template")) for each in value]
    if pairs is None:
        raise UnreadableError("its chat_template is neither a text nor a list of named ones")
    for name, text in pairs:
        if not isinstance(name, str) or not isinstance(text, str):
            raise UnreadableError("its chat_template lists one without a name or a text")
        yield name, text


def _key(dependence: Dependence) -> tuple[Any, ...]:
    """What makes two conditions the same in two templates."""
    return dependence.subject, dependence.literals, dependence.added, dependence.changes


def _findings(template: Template, in_base: set[tuple[Any, ...]]) -> list[Finding]:
    """What one template holds, whatever the base's does."""
    try:
        analysis = analyse(template.text)
    except UnparsedError as error:
        message = (
            f"Jinja does not parse this chat template ({escaped(str(error))}), so nothing is known of it. "
            "Other software may read it all the same: correct it, or take the base's."
        )
        return [_finding("template-unparsed", "warning", message, template, error.line)]
    findings, ordinary = list[Finding](), list[Dependence]()
    lines = template.text.splitlines()
    for dependence in analysis.dependences:
        if not dependence.suspicious:
            ordinary.append(dependence)
            continue
        # How bad a condition is that no template needs.
        literals = ", ".join(repr(escaped(text, 60)) for text in dependence.literals[:3])
        asks = ASKS[dependence.subject].format(literals=literals or "something that it hides")
        added = [text for text in dependence.added if natural(text)] or list(dependence.added)
        level: Level = "warning"
        if (dependence.natural or dependence.subject == "date") and (dependence.changes or added):
            level = "error"
        if _key(dependence) in in_base:
            level = "note"
        changes = "changes the prompt" if dependence.changes else "may do anything"
        then = "writes text of its own" if added else changes
        base = "; the base's template does the same" if level == "note" else ""
        message = (
            f"The chat template {asks} and then {then}{base}. Read the line, and take the base's template "
            "instead."
        )
        # A template may stand on one line: its beginning is shown.
        source = escaped(lines[dependence.line - 1].strip()) if 0 < dependence.line <= len(lines) else ""
        evidence: dict[str, Any] = {
            "asks": dependence.subject, "literals": _texts(dependence.literals), "added": _texts(added),
            "source": source,
        }  # fmt: skip
        findings.append(_finding("template-condition", level, message, template, dependence.line, **evidence))
    if ordinary:
        listed = [
            {"line": each.line, "asks": each.subject, "literals": _texts(each.literals)} for each in ordinary
        ]
        message = (
            f"Conditions on what messages say that ask for markup and write none but markup: {len(ordinary)}."
        )
        findings.append(_finding("template-conditions", "note", message, template, conditions=listed))
    for line in analysis.includes:
        message = (
            "It includes another template, which chat templates cannot: it fails, or reads what is not here."
        )
        findings.append(_finding("template-include", "warning", message, template, line))
    for line, name in analysis.escapes:
        message = (
            f"It asks for {escaped(name, 60)}, as templates do that try to leave Jinja's sandbox. Do not "
            "render it."
        )
        findings.append(_finding("template-escape", "error", message, template, line))
    return findings


def _compared(template: Template, base: Sequence[Template], of_base: Sequence[Analysis]) -> list[Finding]:
    """How a template differs from the base's of the same name."""
    same_name = [each.text for each in base if each.name == template.name]
    if template.text in same_name:
        return []
    if any(_squeezed(template.text) == _squeezed(text) for text in same_name):
        message = "The chat template differs from the base's in white space, which may reach the prompt."
        return [
            _finding("template-changed", "note", message, template, diff=_diff(same_name[0], template.text))
        ]
    before = {_squeezed(text) for analysis in of_base for text in analysis.texts}
    try:
        texts = [text for text in analyse(template.text).texts if _squeezed(text) not in before]
    except UnparsedError:
        texts = []
    new = [text for text in texts if natural(text)]
    level: Level = "warning" if new and base else "note"
    message = (
        f"The chat template is another than the base's and holds {len(new)} texts that the base's does not. "
        "Read the differences."
        if new
        else "The chat template is another than the base's, in markup alone. Read the differences."
    )
    if not same_name:
        message = "The base has no chat template of this name, so that there is nothing to compare it with."
    diff = _diff(same_name[0] if same_name else "", template.text)
    return [_finding("template-changed", level, message, template, diff=diff, texts=_texts(new))]


def _conflicts(templates: Sequence[Template]) -> dict[str, list[str]]:
    """Names that stand for several texts in one folder, with the texts; a GGUF file is read by itself."""
    by_name: dict[str, set[str]] = {}
    for template in templates:
        if not template.file.endswith(".gguf"):
            by_name.setdefault(template.name, set()).add(template.text)
    return {name: sorted(texts) for name, texts in by_name.items() if len(texts) > 1}


def _finding(
    rule: str, level: Level, message: str, place: Template, line: int | None = None, **evidence: Any
) -> Finding:
    """A finding of a template; its line is the file's only where the file holds nothing else."""
    if line is not None and not place.is_file:
        evidence["line_of_template"] = line
    where = line if place.is_file else None
    return Finding("files", rule, level, message, escaped(place.where), where, evidence)


def _texts(texts: Sequence[str]) -> list[str]:
    return [escaped(text) for text in texts[:MOST_TEXTS]]


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _diff(before: str, after: str) -> list[str]:
    """Lines of a unified diff; a template on one line is parted at its tags."""
    old, new = _lines(before), _lines(after)
    if max(len(old), len(new)) > MOST_LINES:
        return [f"{len(old):,} lines before, {len(new):,} after: too many to compare here"]
    diff = list(difflib.unified_diff(old, new, "base", "suspect", n=1, lineterm=""))
    more = [f"and {len(diff) - LONGEST_DIFF} lines more"] if len(diff) > LONGEST_DIFF else []
    return [escaped(line, LONGEST_LINE) for line in diff[:LONGEST_DIFF]] + more


def _lines(text: str) -> list[str]:
    lines = text.splitlines()
    if any(len(line) > LONGEST_LINE for line in lines):
        lines = re.split(r"(?<=[%}]\})|\n", text)
    return lines
