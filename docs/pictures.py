"""Make the pictures of the documentation anew: of runs, a report, a comparison, and Inspect's viewer.

    python docs/pictures.py RUN [RUN ...] --comparison COMPARISON
    python docs/pictures.py --inspect RUN

The first run has every stage: `safetynet run`, then `detect`, `mitigate` and `persist`. The others add
figures that it lacks, such as those of experts, or are the folder that `benchmarks/evasion.py` leaves.
COMPARISON is the folder that `benchmarks/comparing.py` leaves. Figures are shrunk to the width of a page; the
pages are photographed in Debian's chromium. Inspect's viewer shows triggered rows of a run with a
monitor, answered under its guard.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).with_name("images")
WIDTH, COLOURS = 1200, 128
PAGE = {"width": 1180, "height": 960}
PATIENCE_MS = 300_000
"""Most milliseconds that Inspect's viewer may take, on a machine with other work."""
VIEWER = {"width": 1180, "height": 900}
BELOW_PATH = {"x": 0, "y": 28, "width": 1180, "height": 872}
"""Inspect's viewer without its first line, which is the log's path on this machine."""
PHONE = {"width": 390, "height": 844}
PARTS = {"report-map": "#promptmap", "report-prompts": "#prompts"}
"""Parts of the report that have pictures of their own."""


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="*", help="run directories, the first with every stage")
    parser.add_argument("--comparison", type=Path, help="folder of a comparison")
    parser.add_argument("--inspect", type=Path, help="run with a monitor")
    args = parser.parse_args()
    figures = {path.stem: path for run in reversed(args.runs) for path in (run / "figures").glob("*.png")}
    for name, path in sorted(figures.items()):
        write(Image.open(path), f"figure-{name}")
    for figure in sorted((args.comparison / "figures").glob("*.png")) if args.comparison else ():
        write(Image.open(figure), figure.stem)
    logs = tempfile.TemporaryDirectory()
    sample = logged(args.inspect, logs.name) if args.inspect else ""  # its loop and Playwright's are two
    options = ["--disable-gpu"] + (["--no-sandbox"] if os.geteuid() == 0 else [])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        if args.runs:
            photograph(browser, args.runs[0] / "report.html")
        if args.inspect:
            photograph_viewer(browser, logs.name, sample)
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


def logged(run: Path, logs: str) -> str:
    """Ask a run some triggered rows in Inspect, under its guard; where one of them is in the viewer."""
    from inspect_ai import eval as evaluate
    from inspect_ai.model import get_model

    model = get_model(f"safetynet/{run}", guard="flag", fpr=0.05)
    [log] = evaluate(
        "safetynet/triggered", model=model, task_args={"run": str(run)}, limit=4, log_dir=logs, display="none"
    )
    assert log.samples, log.error
    return f"{Path(log.location).name}/samples/sample/{log.samples[0].id}/1"


def photograph_viewer(browser: Browser, logs: str, sample: str) -> None:
    """A sample in `inspect view`: where its trigger stands, and what the guard decided."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "inspect_ai", "view", "--log-dir", logs, "--port", str(port)]
    viewer = subprocess.Popen(  # noqa: S603  # Inspect's own viewer, on a log of one's own
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + PATIENCE_MS / 1000
        while viewer.poll() is None and time.monotonic() < until:
            with socket.socket() as reached:
                if reached.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        for tab, text in (("messages", "Metadata"), ("transcript", "safetynet guard")):
            page = browser.new_page(viewport=VIEWER)
            page.set_default_timeout(PATIENCE_MS)
            page.goto(f"http://127.0.0.1:{port}/#/logs/{sample}/{tab}")
            page.get_by_text(text).first.wait_for()
            if tab == "messages":
                page.get_by_text("trigger:").first.click()  # its fields are folded
            write(Image.open(BytesIO(page.screenshot(clip=BELOW_PATH))), f"inspect-{tab}")
            page.close()
    finally:
        viewer.terminate()


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
