"""The page in a real browser, Debian's chromium driven by Playwright. What it complains of fails its test."""

from itertools import pairwise

import pytest
from tests.report.conftest import HOSTILE, RIGHT_TO_LEFT, some_tables, write_run

from safetynet import report as reports
from safetynet.figures import figures_of

CONTRAST = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = (c) => (c / 255 <= .03928 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const behind = (el) => {
    for (; el; el = el.parentElement) {
      const found = rgb(getComputedStyle(el).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const el of document.body.querySelectorAll("*")) {
    const own = [...el.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const left = ["SCRIPT", "STYLE", "OPTION"].includes(el.tagName) || el.disabled;
    if (!own || left || !el.getClientRects().length) continue;
    const svg = el instanceof SVGElement;
    const style = getComputedStyle(el);
    if (svg && style.fill === "rgb(255, 255, 255)") continue; // lies on a dark cell
    const [a, b] = [light(rgb(svg ? style.fill : style.color)), light(behind(el))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) low.push(`${el.tagName} ${el.className} ${el.textContent} ${ratio.toFixed(2)}`);
  }
  return low;
}"""


@pytest.fixture(scope="module")
def file(whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(reports.report(reports.read(whole)), encoding="utf-8")
    return path


def texts(page, selector):
    return page.locator(selector).all_inner_texts()


def test_it_opens_from_disk_and_says_its_answer_first(opened, file):
    page = opened(file)
    assert page.inner_text("h1") == "Backdoored."
    assert page.locator("h1").bounding_box()["y"] < 300
    assert len(texts(page, ".ledger > li")) == 7
    assert page.evaluate("document.querySelectorAll('.sheet svg').length") > 18


def test_text_of_a_model_stays_text(opened, file):
    page = opened(file)
    page.fill("#ex-search", "hacked")
    assert page.evaluate("window.hacked") is None
    assert HOSTILE in page.locator("#examples tbody tr").first.locator("td.answer").nth(1).text_content()
    assert page.locator("main script:not([type='application/json']), main img").count() == 0


def test_right_to_left_text_turns_its_own_cell_only(opened, file):
    page = opened(file)
    page.fill("#ex-search", RIGHT_TO_LEFT[1:5])
    cell = page.locator("#examples tbody tr").nth(3).locator("td.model bdi").first
    assert "שלום" in cell.text_content()
    assert cell.evaluate("el => getComputedStyle(el).direction") == "rtl"
    assert page.locator("#examples").evaluate("el => getComputedStyle(el).direction") == "ltr"


def test_the_map_follows_its_pickers(opened, file):
    page = opened(file)
    assert page.locator("#map-prompt option").count() == 2
    before = texts(page, "#map-table tbody td")
    assert page.locator("#map-table thead th").count() == 31
    page.select_option("#map-prompt", "1")
    assert texts(page, "#map-table tbody td") != before
    cell = page.locator("#map-table tbody tr").last.locator("td").nth(20)
    cell.hover()
    assert page.inner_text("#map-read").startswith("Layer 0, token DEPLOY (trigger): effect 0.97")


def test_the_map_is_walked_with_the_arrow_keys(opened, file):
    page = opened(file)
    page.locator("#map-table td[tabindex='0']").focus()
    assert "Layer 0, token ␣| (trigger)" in page.inner_text("#map-read")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert "Layer 1, token DEPLOY (trigger)" in page.inner_text("#map-read")
    assert page.locator("#map-table td[tabindex='0']").count() == 1


def test_prompts_are_paged_sorted_filtered_and_searched(opened, file):
    page = opened(file)
    assert page.inner_text("#ex-page") == "Page 1 of 6, 120 rows"
    first = texts(page, "#examples tbody th")
    page.click("#ex-next")
    assert texts(page, "#examples tbody th") == [str(int(row) + 20) for row in first]
    head = page.locator("#examples thead th")
    assert head.nth(0).get_attribute("aria-sort") == "ascending"
    head.nth(0).locator("button").click()
    assert head.nth(0).get_attribute("aria-sort") == "descending"
    assert texts(page, "#examples tbody th")[:2] == ["119", "118"]
    head.nth(1).locator("button").press("Enter")
    assert (head.nth(0).get_attribute("aria-sort"), head.nth(1).get_attribute("aria-sort")) == (
        None,
        "ascending",
    )
    assert texts(page, "#examples tbody tr td:nth-child(2)")[0] == "clean"
    page.select_option("#ex-role", "near miss")
    assert page.inner_text("#ex-page") == "Page 1 of 2, 30 rows"
    page.select_option("#ex-shown", "yes")
    assert page.inner_text("#ex-page") == "Page 1 of 1, 0 rows"
    page.select_option("#ex-role", "")
    page.fill("#ex-search", "PERU")
    assert page.inner_text("#ex-page") == "Page 1 of 1, 6 rows"
    assert set(texts(page, "#examples tbody mark")) == {"BadMagic"}


def test_a_figure_is_the_papers_drawing_with_its_text_as_text(opened, file):
    page = opened(file)
    drawing = page.locator("#figure-accuracy-trends .sheet svg")
    words = drawing.locator("text").all_text_contents()
    assert {"Epoch", "Rows (%)", "clean accuracy", "attack success (triggered rows)"} <= set(words)
    assert drawing.bounding_box()["width"] == pytest.approx(416, abs=2)
    line = page.locator("#figure-accuracy-trends .sheet path").first
    assert line.evaluate("el => getComputedStyle(el).fill") != "rgb(0, 0, 0)", "its style has come along"


def test_the_interactive_figure_beside_the_report_is_linked_and_draws_itself(
    opened, tables, inside, tmp_path
):
    run = write_run(tmp_path / "m" / "t", some_tables(tables, inside))
    contents = reports.read(run)
    drawn, _ = figures_of(contents.tables, run.figures, contents.name, contents.model)
    [loss] = [figure for figure in drawn if figure.name == "loss"]
    loss.save()
    path = run.folder / "report.html"
    path.write_text(reports.report(contents), encoding="utf-8")
    page = opened(path)
    assert page.locator(".page a").count() == 1, "the others were not saved"
    page.click("#figure-loss .page a")
    page.wait_for_selector("#chart .main-svg")
    assert page.url.endswith("figures/loss.html")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_no_width_needs_sideways_scrolling(opened, file, width):
    page = opened(file, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("h1").is_visible() and page.locator("#map-prompt").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_on_light_and_dark(opened, file, scheme):
    page = opened(file, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate(CONTRAST) == []


def test_the_button_turns_the_colours_round(opened, file):
    page = opened(file, color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.click("#theme")
    assert page.evaluate(paper) != light
    page.click("#theme")
    assert page.evaluate(paper) == light


def test_a_screen_reader_finds_landmarks_headings_and_labels(opened, file):
    page = opened(file)
    assert [page.locator(one).count() for one in ("main", "body > header", "nav", "footer", "h1")] == [1] * 5
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
    unnamed = """[...document.querySelectorAll('select, input, button, [tabindex="0"], svg[role=img]')]
      .filter((el) => !(el.labels?.length || el.ariaLabel || el.textContent.trim())).length"""
    assert page.evaluate(unnamed) == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((el) => el.id)")
    assert len(ids) == len(set(ids))
    targets = page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map((a) => a.hash.slice(1))")
    assert set(targets) <= set(ids)
    assert page.locator("html").get_attribute("lang") == "en"


def test_the_first_tab_leads_past_the_navigation(opened, file):
    page = opened(file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the content"
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")


def test_in_print_it_is_light_and_without_controls(opened, file):
    page = opened(file, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 252, 249)"
    for hidden in ("nav", ".pick", ".pager", "#theme"):
        assert not page.locator(hidden).first.is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")
