"""The site: every page is reached from the first one. `make docs` checks links, anchors and tutorials."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = runpy.run_path(str(ROOT / "docs" / "site" / "conf.py"))


def reached() -> set[str]:
    """Pages that the navigation leads to, without suffix."""
    pages, ahead = set[str](), [SITE["root_doc"]]
    while ahead:
        page = ahead.pop()
        if page not in pages:
            pages.add(page)
            files = [ROOT / f"{page}{suffix}" for suffix in (".md", ".py")]
            text = next(file for file in files if file.exists()).read_text(encoding="utf-8")
            ahead += SITE["below"](page, text)
    return pages


def test_every_page_is_reached_from_the_first():
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/tutorials/*.py")]
    assert {file.relative_to(ROOT).with_suffix("").as_posix() for file in files} == reached()


def test_a_page_that_fetches_from_another_server_is_noticed():
    remote = SITE["REMOTE"].search
    assert remote('<script async="async" src="https://cdn.example/mathjax.js"></script>')
    assert remote('<link rel="stylesheet" href="//fonts.example/css">')
    assert not remote('<a href="https://example.org">elsewhere</a><script src="_static/site.js"></script>')


def test_the_tables_of_the_recipe_have_every_field():
    fields = runpy.run_path(str(ROOT / "docs" / "site" / "fields.py"))
    text = fields["tables"]()
    missing = [
        f"{place}.{name}"
        for place, section in fields["sections"](fields["Recipe"])
        for name in section.model_fields
        if f"| `{name}` | " not in text
    ]
    assert missing == []
