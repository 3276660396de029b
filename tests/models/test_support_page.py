"""docs/support.md: every kind and architecture that is tried stands there, and nothing went wrong."""

from pathlib import Path

from tests.models import architectures, variants

PAGE = (Path(__file__).parents[2] / "docs" / "support.md").read_text()


def test_the_page_has_all_that_is_tried() -> None:
    tried = {*variants.ALL, *variants.EXPERTS, *variants.UNTRIED, *architectures.ARCHITECTURES}
    rows = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.splitlines() if line.startswith("| ")]
    assert tried <= {name for row in rows for name in row.split("; ")}
    assert "WRONG" not in PAGE
