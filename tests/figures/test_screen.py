import re
import subprocess
from html.parser import HTMLParser

import pytest

from safetynet.figures import save, screen, theme


class Attributes(HTMLParser):
    """Everything that could make a browser fetch something."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [
            (tag, name, value) for name, value in attrs if name in ("src", "href", "srcset", "data")
        ]


@pytest.mark.parametrize("self_contained", [True, False])
def test_the_page_refers_to_nothing_but_the_library_beside_it(chart, self_contained):
    page = screen.render(chart, self_contained)
    parser = Attributes()
    parser.feed(page)
    assert parser.found == ([] if self_contained else [("script", "src", "plotly.min.js")])
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(\s*['\"]?https?:", page.split("<body>")[0])
    assert (len(page) > 4_000_000) is self_contained  # the library is inside


def test_labels_are_shown_as_typed(chart):
    figure = screen.draw(chart)
    names = {trace.name for trace in figure.data if trace.name}
    assert "attack &lt;b&gt;&amp;&#36;x&#36;" in names
    head = screen.render(chart).split("<body>")[0]
    assert "<title>A &quot;figure&quot; &lt;i&gt;&amp;$y$</title>" in head
    assert "How to read it &lt;script&gt;." in screen.render(chart)


def test_axes_carry_the_same_labels_limits_and_ticks_as_on_paper(chart):
    layout = screen.draw(chart).layout
    assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("Step", "Rows (%)")
    assert list(layout.yaxis.range) == pytest.approx([-3.5, 103.5])
    assert list(layout.yaxis.ticktext) == ["0", "50", "100"]
    assert layout.yaxis2.type == "log"
    assert layout.xaxis2.matches == "x"


def test_a_curve_keeps_its_numbers_its_gap_its_interval_and_its_colour(chart):
    traces = screen.draw(chart).data
    curve = next(trace for trace in traces if trace.mode == "lines+markers" and trace.x != (None,))
    assert list(curve.y) == [1, 50, None, 99]
    assert curve.marker.color == theme.LOOKS["triggered"].colour
    assert curve.customdata[1] == "<br>interval 40 to 60"
    # 1-2 and 4 on either side of the gap, and the band of its own; a lower and an upper edge each
    assert sum(trace.fill == "tonexty" for trace in traces) == 3
    point = next(trace for trace in traces if trace.mode == "markers" and trace.x != (None,))
    assert (list(point.error_y.array), list(point.error_y.arrayminus)) == ([2], [1])


def test_every_label_stands_in_the_legend_once(chart):
    shown = [trace.name for trace in screen.draw(chart).data if trace.showlegend is not False]
    assert shown == ["attack &lt;b&gt;&amp;&#36;x&#36;", "_usual", "floor", "schedule"]


@pytest.mark.slow
@pytest.mark.parametrize("self_contained", [True, False])
def test_the_page_draws_itself_in_a_browser_without_a_complaint(chart, saved, tmp_path, need, self_contained):
    page = save(chart, tmp_path, "alone", self_contained=True)[3] if self_contained else saved[3]
    assert not (page.parent / "plotly.min.js").exists() or not self_contained
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
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=100, check=True
    )
    assert "CONSOLE" not in done.stderr
    assert 'class="main-svg"' in done.stdout
    assert ">attack &lt;b&gt;&amp;$x$</text>" in done.stdout
