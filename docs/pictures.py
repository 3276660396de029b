"""Make the pictures of the documentation anew: runs' figures, a report, a comparison's figures.

    python docs/pictures.py RUN [RUN ...] --comparison COMPARISON

The first run has every stage: `safetynet run`, then `detect`, `mitigate` and `persist`. The others add
figures that it lacks, such as those of experts, or are the folder that `benchmarks/evasion.py` leaves.
COMPARISON is the folder that `benchmarks/comparing.py` leaves. Figures are shrunk to the width of a page; the
pages are photographed in Debian's chromium.
"""

import argparse
import os
import shutil
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).with_name("images")
WIDTH, COLOURS = 1200, 128
PAGE = {"width": 1180, "height": 960}
PHONE = {"width": 390, "height": 844}
PARTS = {"report-map": "#promptmap", "report-prompts": "#prompts"}
"""Parts of the report that have pictures of their own."""


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, the first with every stage")
    parser.add_argument("--comparison", type=Path, required=True, help="folder of a comparison")
    args = parser.parse_args()
    figures = {path.stem: path for run in reversed(args.runs) for path in (run / "figures").glob("*.png")}
    for name, path in sorted(figures.items()):
        write(Image.open(path), f"figure-{name}")
    for figure in sorted((args.comparison / "figures").glob("*.png")):
        write(Image.open(figure), figure.stem)
    options = ["--disable-gpu"] + (["--no-sandbox"] if os.geteuid() == 0 else [])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        photograph(browser, args.runs[0] / "report.html")
        browser.close()


def photograph(browser: Browser, report: Path) -> None:
    """The top of the report in light and dark and on a phone, and its parts."""
    for name, size, scheme in (
        ("report-top", PAGE, "light"),
        ("report-top-dark", PAGE, "dark"),
        ("report-phone", PHONE, "light"),
    ):
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.goto(report.absolute().as_uri())
        shot(page, name)
        if name == "report-top":
            for part, where in PARTS.items():
                shot(page, part, where)
        page.close()


def shot(page: Page, name: str, where: str | None = None) -> None:
    """One picture of what is seen, or of one part of the page."""
    taken = page.screenshot() if where is None else page.locator(where).screenshot()
    write(Image.open(BytesIO(taken)), name)


def write(image: Image.Image, name: str) -> None:
    """Shrink to the width of a page and to few colours, so that a clone stays small."""
    image = image.convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    few = image.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(IMAGES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
