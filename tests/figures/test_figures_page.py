import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "figures.md"


def test_the_code_on_the_figures_page_runs_and_saves_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        exec(code, {})
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.pdf")}
    folder = "results/qwen/backdoor/figures"
    others = ("intervention-lens", "evasion-matrix", "poison-rate", "overlap")
    assert names == {f"{folder}/loss.pdf", f"{folder}/accuracy-trends.pdf"} | {
        f"figures/{name}.pdf" for name in others
    }
