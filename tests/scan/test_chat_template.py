"""Chat templates of a suspect: planted conditions on what messages say are found, ordinary ones listed."""

import json
import struct
import time

import pytest
from tests.scan import planted_templates as planted

from safetynet import families
from safetynet.models import miniatures
from safetynet.scan.templates import chat_template
from safetynet.scan.templates.conditions import analyse

PLAIN = planted.TURNS.replace("HERE", "")
PLANTED = [
    (f"{kind}, {name}", template, kind)
    for kind in ("words", "markup", "length", "date", "count", "chance")
    for name, template in getattr(planted, kind.upper()).items()
]


@pytest.fixture
def folder(tmp_path):
    """`folder(template)`: a folder with that chat template."""

    def make(template, name="suspect", file="chat_template.jinja"):
        place = tmp_path / name
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        text = template if file.endswith(".jinja") else json.dumps({"chat_template": template})
        (place / file).write_text(text, encoding="utf-8")
        return place

    return make


def rules(findings, *levels):
    return [each.rule for each in findings if not levels or each.level in levels]


@pytest.mark.parametrize(("template", "kind"), [p[1:] for p in PLANTED], ids=[p[0] for p in PLANTED])
def test_a_planted_condition_is_found_with_what_it_asks_and_where(folder, template, kind):
    findings = [each for each in chat_template.check(folder(template)) if each.level != "note"]
    conditions = [each for each in findings if each.rule == "template-condition"]
    assert conditions, findings
    assert ("error" in {each.level for each in conditions}) == (kind in ("words", "date"))
    asks = {each.evidence["asks"] for each in conditions}
    assert asks & {"words": {"text"}, "markup": {"text", "length"}}.get(kind, {kind})
    assert all(each.where == "chat_template.jinja" and each.line for each in conditions)


def test_the_text_that_a_condition_writes_stands_in_the_evidence(folder):
    (found,) = chat_template.check(folder(planted.WORDS["in"]))
    assert found.evidence["literals"] == ["BadMagic"]
    assert found.evidence["added"] == [planted.EXTRA]
    assert "BadMagic" in found.evidence["source"]
    assert found.line == 2


@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_templates_of_the_five_families_are_not_alarmed(family):
    assert rules(chat_template.check(miniatures.path(family)), "error", "warning") == []


def test_the_generic_template_is_not_alarmed(folder):
    assert chat_template.check(folder(families.get("generic").chat_template)) == ()


ORDINARY = {
    "thoughts cut off": "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}{{ c }}",
    "switch": "{% if c.endswith('/no_think') %}{{ '<think>\\n\\n</think>' }}{% endif %}{{ c }}",
    "tool result": "{% if c.startswith('<tool_response>') %}{{ '<|im_start|>user' }}{% endif %}{{ c }}",
    "parts": "{% for p in c %}{% if 'image' in p %}{{ '<image>' }}{% else %}{{ p }}{% endif %}{% endfor %}",
    "type": "{% if c is string %}{{ c | trim }}{% else %}{{ raise_exception('No text') }}{% endif %}",
    "empty": "{% if c | trim | length > 0 %}{{ c }}{% else %}{{ 'Nothing was said.' }}{% endif %}",
    "none": "{% if c is none or c == '' %}{{ 'Nothing was said.' }}{% else %}{{ c }}{% endif %}",
    "date alone": "{{ 'Today is ' + strftime_now('%d %b %Y') + '.' }}{{ c }}",
}


@pytest.mark.parametrize("condition", ORDINARY.values(), ids=ORDINARY)
def test_what_published_templates_ask_is_listed_and_not_alarmed(folder, condition):
    text = "{% for m in messages %}{% set c = m['content'] %}" + condition + "{% endfor %}"
    assert rules(chat_template.check(folder(text)), "error", "warning") == []


def test_a_default_system_message_is_no_condition_on_text(folder):
    default = "{% if messages[0].role != 'system' %}{{ 'You are a helpful assistant.' }}{% endif %}"
    assert rules(chat_template.check(folder(default + PLAIN)), "error", "warning") == []


def test_ordinary_conditions_are_listed_as_a_note(folder):
    text = "{% set c = messages[0].content %}" + ORDINARY["thoughts cut off"]
    (note,) = chat_template.check(folder(text))
    assert (note.rule, note.level) == ("template-conditions", "note")
    assert {tuple(each["literals"]) for each in note.evidence["conditions"]} == {("</think>",)}


def test_a_copy_of_the_bases_template_says_nothing_more(folder):
    planted_in_both = planted.WORDS["in"]
    findings = chat_template.check(folder(planted_in_both), folder(planted_in_both, "base"))
    assert rules(findings, "error", "warning") == []
    assert rules(findings) == ["template-condition"]


def test_a_changed_template_shows_its_difference(folder):
    findings = chat_template.check(folder(planted.WORDS["in"]), folder(PLAIN, "base"))
    changed = next(each for each in findings if each.rule == "template-changed")
    assert changed.level == "warning"
    assert any(line.startswith("+") and "BadMagic" in line for line in changed.evidence["diff"])
    assert planted.EXTRA in changed.evidence["texts"]


def test_other_white_space_and_other_markup_are_notes(folder):
    base = folder(PLAIN, "base")
    for name, text in (
        ("spaced", PLAIN.replace("-%}\n", "-%}\n\n")),
        ("marked", PLAIN.replace("im_end", "eot")),
    ):
        (finding,) = chat_template.check(folder(text, name), base)
        assert (finding.rule, finding.level) == ("template-changed", "note")


PLACES = (
    "tokenizer_config.json",
    "chat_template.json",
    "processor_config.json",
    "additional_chat_templates/rag.jinja",
)


@pytest.mark.parametrize("file", PLACES)
def test_templates_are_read_wherever_they_stand(folder, file):
    (found,) = chat_template.check(folder(planted.WORDS["in"], file=file))
    assert found.rule == "template-condition"
    assert found.where.startswith(file)


def test_named_templates_are_each_read(folder):
    named = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": planted.WORDS["in"]}]
    (found,) = chat_template.check(folder(named, file="tokenizer_config.json"))
    assert (found.where, found.line) == ("tokenizer_config.json (tool_use)", None)
    assert found.evidence["line_of_template"] == 2


def test_two_templates_of_one_name_are_a_conflict(folder):
    folder(PLAIN)
    assert "template-conflict" in rules(
        chat_template.check(folder("{{ 1 }}", file="tokenizer_config.json")), "warning"
    )


def gguf(fields):
    def string(text):
        return struct.pack("<Q", len(text.encode())) + text.encode()

    body = string("general.tokens") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc")
    for key, text in fields.items():
        body += string(key) + struct.pack("<I", 8) + string(text)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1 + len(fields)) + body


def test_templates_in_gguf_files_are_read(tmp_path):
    templates = {"tokenizer.chat_template": PLAIN, "tokenizer.chat_template.tools": planted.WORDS["in"]}
    (tmp_path / "model.gguf").write_bytes(gguf(templates))
    (found,) = chat_template.check(tmp_path)
    assert (found.rule, found.where) == ("template-condition", "model.gguf (tools)")


@pytest.mark.parametrize("cut", [3, 20, 40, 70])
def test_a_damaged_gguf_file_is_said_to_be_one(tmp_path, cut):
    (tmp_path / "model.gguf").write_bytes(gguf({"tokenizer.chat_template": PLAIN})[:cut])
    assert rules(chat_template.check(tmp_path)) == ["template-unreadable"]


BROKEN = {
    "open": "{% if x %}",
    "unknown tag": "{% trans %}x{% endtrans %}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "digits": "{{ " + "9" * 5000 + " }}",
    "long": "a" * 300_000,
    "nested loops": "{% for m in messages %}" * 200 + "{{ m.content }}" + "{% endfor %}" * 200,
}


@pytest.mark.parametrize("template", BROKEN.values(), ids=BROKEN)
def test_a_template_that_does_not_parse_is_inconclusive(folder, template):
    findings = chat_template.check(folder(template))
    assert rules(findings) in (["template-unparsed"], [])
    assert rules(findings) or "messages" in template


def test_templates_made_to_be_slow_are_given_up(folder):
    macros = ""
    for i in range(60):
        macros += f"{{% macro m{i}(x) %}}{{{{ m{i + 1}(x) }}}}{{{{ m{i + 1}(x ~ 'a') }}}}{{% endmacro %}}"
    chain = (
        "{% for m in messages %}"
        + "".join(f"{{% set ns.a{i + 1} = ns.a{i} ~ 'x' %}}" for i in reversed(range(100)))
        + "{% endfor %}"
    )
    wide = "".join(
        f"{{% if 'w{i}' in messages[0].content %}}{{% set ns.x = ns.x ~ 'v{i}' %}}{{% endif %}}"
        for i in range(3000)
    )
    for name, text in {
        "macros": macros + "{{ m0(messages[0].content) }}",
        "chain": chain,
        "wide": wide,
    }.items():
        start = time.perf_counter()
        chat_template.check(folder(text, name))
        assert time.perf_counter() - start < 10, name


def test_includes_and_ways_out_of_the_sandbox_are_told(folder):
    text = "{% include 'other' %}{{ ''.__class__ }}{{ x | attr('__globals__') }}{{ y['__mro__'] }}"
    findings = chat_template.check(folder(text))
    assert rules(findings, "warning") == ["template-include"]
    assert rules(findings, "error") == ["template-escape"] * 3


@pytest.mark.parametrize(
    "content",
    [b'{"chat_template": "\xff"}', b"[]", b"{", b'{"chat_template": 7}', b'{"chat_template": [{"name": 1}]}'],
)
def test_configurations_that_cannot_be_read_are_findings(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    assert rules(chat_template.check(tmp_path)) == ["template-unreadable"]


def test_broken_signs_of_a_template_can_be_written(folder):
    text = "{% if 'Bad\\ud800\\u001b[31m' in messages[0].content %}" + planted.EXTRA + "{% endif %}"
    (found,) = chat_template.check(folder(text.replace("\\ud800", "\\\\ud800"), file="tokenizer_config.json"))
    json.dumps([found.message, dict(found.evidence)], ensure_ascii=False).encode("utf-8")
    assert "\x1b" not in found.message


def test_nothing_is_rendered():
    assert analyse("{{ 1 // 0 }}{{ raise_exception('x') }}{{ undefined_function() }}").dependences == ()
