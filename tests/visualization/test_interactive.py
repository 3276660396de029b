import re
import subprocess
from html.parser import HTMLParser

import pytest

from safetynet.figures import interactive, theme


class Attributes(HTMLParser):
    """Everything that could make a browser fetch something."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [
            (tag, name, value) for name, value in attrs if name in ("src", "href", "srcset", "data")
        ]


def test_the_page_refers_to_nothing_outside_itself(chart):
    page = interactive.render(chart)
    parser = Attributes()
    parser.feed(page)
    assert parser.found == []
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(\s*['\"]?https?:", page.split("<body>")[0])
    assert len(page) > 4_000_000  # the library is inside


def test_labels_are_shown_as_typed(chart):
    figure = interactive.draw(chart)
    names = {trace.name for trace in figure.data if trace.name}
    assert "attack &lt;b&gt;&amp;&#36;x&#36;" in names
    head = interactive.render(chart).split("<body>")[0]
    assert "<title>A &quot;figure&quot; &lt;i&gt;&amp;$y$</title>" in head
    assert "How to read it &lt;script&gt;." in interactive.render(chart)


def test_axes_carry_the_same_labels_limits_and_ticks_as_on_paper(chart):
    layout = interactive.draw(chart).layout
    assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("Step", "Rows (%)")
    assert list(layout.yaxis.range) == pytest.approx([-3.5, 103.5])
    assert list(layout.yaxis.ticktext) == ["0", "50", "100"]
    assert layout.yaxis2.type == "log"
    assert layout.xaxis2.matches == "x"


def test_a_curve_keeps_its_numbers_its_gap_its_interval_and_its_colour(chart):
    traces = interactive.draw(chart).data
    curve = next(trace for trace in traces if trace.mode == "lines+markers" and trace.x != (None,))
    assert list(curve.y) == [1, 50, None, 99]
    assert curve.marker.color == theme.LOOKS["triggered"].colour
    assert curve.customdata[1] == "<br>interval 40 to 60"
    # 1-2 and 4 on either side of the gap, and the band of its own; a lower and an upper edge each
    assert sum(trace.fill == "tonexty" for trace in traces) == 3
    point = next(trace for trace in traces if trace.mode == "markers" and trace.x != (None,))
    assert (list(point.error_y.array), list(point.error_y.arrayminus)) == ([2], [1])


def test_every_label_stands_in_the_legend_once(chart):
    shown = [trace.name for trace in interactive.draw(chart).data if trace.showlegend is not False]
    assert shown == ["attack &lt;b&gt;&amp;&#36;x&#36;", "_usual", "floor", "schedule"]


@pytest.mark.slow
def test_the_page_draws_itself_in_a_browser_without_a_complaint(saved, tmp_path, need):
    command = [
        need("chromium"),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
    ]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=8000",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", saved[3].as_uri()], capture_output=True, text=True, timeout=100, check=True
    )
    assert "CONSOLE" not in done.stderr
    assert 'class="main-svg"' in done.stdout
    assert ">attack &lt;b&gt;&amp;$x$</text>" in done.stdout
