import shutil

import pytest
from tests.report.conftest import some_tables, write_run

from safetynet import report as reports
from safetynet.errors import InputError
from safetynet.report import stage


@pytest.fixture
def results(tables, inside, tmp_path):
    """Three runs, one of another version, one that cannot be read."""
    made = some_tables(tables, inside)
    whole = write_run(tmp_path / "results" / "qwen" / "one", made)
    weak = made["evaluation"].copy()
    attack = (weak["model"] == "backdoored") & (weak["metric"] == "asr")
    weak.loc[attack, ["value", "low", "high"]] = [0.3, 0.2, 0.4]
    write_run(tmp_path / "results" / "gemma" / "two", {"evaluation": weak}, versions={"safetynet": "0.0.9"})
    broken = tmp_path / "results" / "qwen" / "three"
    shutil.copytree(whole.folder, broken)
    (broken / "manifest.json").write_text("[")
    return tmp_path / "results"


def test_the_index_lists_every_run_links_its_report_and_says_what_is_wrong(results):
    page = stage.index(results)
    text = page.read_text(encoding="utf-8")
    assert page == results / "index.html"
    assert '<a href="qwen/one/report.html">' in text and '<a href="gemma/two/report.html">' in text
    assert (results / "gemma" / "two" / "report.html").exists()
    assert "manifest.json: the manifest is damaged" in text
    assert "Mixed versions" in text and "0.0.9, 0.1.0" in text
    assert "Not run:" in text


def test_links_fit_where_the_index_lies(results, tmp_path):
    page = stage.index(results, tmp_path / "elsewhere" / "all.html")
    assert '<a href="../results/qwen/one/report.html">' in page.read_text(encoding="utf-8")


def test_a_folder_without_runs_says_so_and_one_that_is_none_is_refused(tmp_path):
    assert "There is no run here yet" in stage.index(tmp_path).read_text(encoding="utf-8")
    with pytest.raises(InputError, match="is no folder"):
        stage.index(tmp_path / "nowhere")


def test_columns_sort_both_ways_and_the_search_narrows(results, opened):
    page = opened(stage.index(results))
    names = "#runs tbody tr:not([hidden]) th bdi"
    assert page.locator(names).all_inner_texts() == ["gemma/two", "qwen/one", "qwen/three"]
    head = page.locator("#runs thead th").nth(4)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.locator(names).all_inner_texts()[1:] == ["gemma/two", "qwen/one"]
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert page.locator(names).all_inner_texts()[:2] == ["qwen/one", "gemma/two"]
    assert page.locator("#runs thead th[aria-sort]").count() == 1
    page.fill("#search", "gemma")
    assert page.locator(names).all_inner_texts() == ["gemma/two"]
    page.click("#runs tbody tr:not([hidden]) a")
    assert page.inner_text("h1") == "Backdoored."


@pytest.mark.parametrize("width", [320, 1280])
def test_the_index_fits_its_screen(results, opened, width):
    page = opened(stage.index(results), width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert reports.REPORT == "report.html"
