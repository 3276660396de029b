"""A scan as a bill of materials: CycloneDX 1.6, JSON, with the suspect as a machine-learning model.

In: a `ScanResult`. Out: JSON that the library's strict validator accepts.

Components and their hashes, the base, and findings as vulnerabilities are the library's classes. It has none
for a model card, nor does it keep a field that it does not know: the specification's `modelCard` is therefore
put into the JSON that the library wrote. Hashes are of files; a chat template that stands inside
tokenizer_config.json has that file's.
"""

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType, Pedigree
from cyclonedx.model.impact_analysis import ImpactAnalysisState
from cyclonedx.model.vulnerability import (
    BomTarget,
    Vulnerability,
    VulnerabilityAnalysis,
    VulnerabilityRating,
    VulnerabilitySeverity,
    VulnerabilitySource,
)
from cyclonedx.output.json import JsonV1Dot6

from safetynet import __version__
from safetynet.scan.outputs import wording
from safetynet.scan.result import Level, ScanResult
from safetynet.text.printable import printable

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:safetynet:scan")
SEVERITIES: Mapping[Level, VulnerabilitySeverity] = {
    "error": VulnerabilitySeverity.HIGH,
    "warning": VulnerabilitySeverity.MEDIUM,
    "note": VulnerabilitySeverity.INFO,
}
KINDS = (
    ("template", r"chat_template\.(jinja|json)|additional_chat_templates/.*"),
    ("tokenizer", r"(special_)?token.*|vocab\..*|merges\.txt|added_tokens\.json|.*\.tiktoken"),
    ("adapter", r"adapter_.*"),
    ("weights", r".*\.(safetensors|gguf|bin|pt|pth|ckpt)"),
    ("configuration", r".*\.json"),
)
"""What a file is, by its name; the first that fits."""


def bill(result: ScanResult) -> str:
    """The bill, with a serial number that is the same for the same result."""
    files = {}
    for name, digest in result.digests.items():
        inside = name.partition("/")[2]
        kind = next((kind for kind, pattern in KINDS if re.fullmatch(pattern, inside)), "other")
        # A file that was too large to be hashed has a reason in place of its digest.
        hashed = re.fullmatch("[0-9a-fA-F]{64}", digest)
        about = [Property(name="safetynet:kind", value=kind)]
        if not hashed:
            about.append(Property(name="safetynet:digest", value=printable(digest)))
        files[name] = Component(
            name=printable(PurePosixPath(name).name) or "unnamed",
            type=ComponentType.FILE,
            bom_ref=f"file:{printable(name)}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest.lower())] if hashed else [],
            properties=about,
        )
    suspect = Component(
        name=printable(result.suspect) or "unnamed",
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="suspect",
        components=[file for name, file in files.items() if not name.startswith("base/")],
    )
    base = Component(
        name=printable(result.base) or "unknown base",
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="base",
        components=[file for name, file in files.items() if name.startswith("base/")],
    )
    # The answer and what it rests on, in words.
    facts = [
        ("answer", result.answer),
        ("headline", wording.headline(result)),
        ("reason", wording.reason(result)),
    ]
    facts += [(name.lower().replace(" ", "-"), text) for name, text in wording.facts(result).items()]
    facts += [("command", wording.command(result))]
    facts += [(f"rung:{printable(rung.rung)}", wording.measured(rung)) for rung in result.rungs]
    facts += [("not-looked-at", printable(sentence)) for sentence in result.not_looked_at]
    facts += [(f"version:{printable(name)}", printable(str(each))) for name, each in result.versions.items()]
    bom = Bom(
        serial_number=uuid.uuid5(NAMESPACE, result.to_json()),
        metadata=BomMetaData(
            component=suspect,
            properties=[Property(name=f"safetynet:{name}", value=text) for name, text in facts],
        ),
        vulnerabilities=_vulnerabilities(result, files),
    )
    bom.metadata.tools.components.add(
        Component(name="safetynet", version=__version__, type=ComponentType.APPLICATION, bom_ref="safetynet")
    )
    # An adapter needs its base to run; a merged or fully fine-tuned model descends from it.
    adapter = any(name.startswith("suspect/adapter_") for name in files)
    if result.base and adapter:
        bom.components.add(base)
    elif result.base:
        suspect.pedigree = Pedigree(ancestors=[base])
    bom.register_dependency(suspect, [base] if result.base and adapter else [])
    written = json.loads(JsonV1Dot6(bom).output_as_string())
    # The specification's model card: how often each trigger fires, and what the scan leaves open.
    metrics = [
        {
            "type": "attack success rate",
            "value": f"{rate[0]}",
            "slice": f"“{printable(trigger.text)}” as {printable(trigger.placement)}: {name}",
            "confidenceInterval": {"lowerBound": f"{rate[1]}", "upperBound": f"{rate[2]}"},
        }
        for trigger in result.triggers
        for name, rate in wording.rates(trigger).items()
    ]
    open_questions = [printable(sentence) for sentence in result.not_looked_at]
    open_questions += [f"{rung.rung}: {wording.measured(rung)}" for rung in result.rungs if rung.skipped]
    written["metadata"]["component"]["modelCard"] = {
        "modelParameters": {"task": "text-generation"},
        **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
        **({"considerations": {"technicalLimitations": open_questions}} if open_questions else {}),
    }
    return json.dumps(written, indent=2, allow_nan=False) + "\n"


def _vulnerabilities(result: ScanResult, files: Mapping[str, Component]) -> Iterator[Vulnerability]:
    """Triggers, which are exploitable, and findings, which somebody has to look at."""
    for number, trigger in enumerate(result.triggers, 1):
        yield Vulnerability(
            bom_ref=f"trigger-{number}",
            id=f"safetynet:verification/{wording.TRIGGER}",
            source=VulnerabilitySource(name="SafetyNet"),
            ratings=[VulnerabilityRating(severity=VulnerabilitySeverity.CRITICAL)],
            description=f"“{printable(trigger.text)}”: {wording.effect(trigger)}.",
            detail=f"{wording.fires(trigger)}.",
            recommendation=wording.about("verification", wording.TRIGGER),
            analysis=VulnerabilityAnalysis(state=ImpactAnalysisState.EXPLOITABLE),
            affects=[BomTarget(ref="suspect")],
            properties=[Property(name="safetynet:trigger", value=printable(trigger.text))],
        )
    for number, finding in enumerate(result.findings, 1):
        file = files.get(f"suspect/{finding.where}")
        behind = {
            "level": finding.level, "where": wording.place(finding), "evidence": wording.evidence(finding),
        }  # fmt: skip
        yield Vulnerability(
            bom_ref=f"finding-{number}",
            id=printable(f"safetynet:{finding.rung}/{finding.rule}"),
            source=VulnerabilitySource(name="SafetyNet"),
            ratings=[VulnerabilityRating(severity=SEVERITIES[finding.level])],
            description=printable(finding.message),
            recommendation=wording.about(finding.rung, finding.rule),
            analysis=VulnerabilityAnalysis(state=ImpactAnalysisState.IN_TRIAGE),
            affects=[BomTarget(ref="suspect" if file is None else str(file.bom_ref.value))],
            properties=[
                Property(name=f"safetynet:{name}", value=text) for name, text in behind.items() if text
            ],
        )
