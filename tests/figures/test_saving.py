import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from io import BytesIO

import pandas as pd
import pytest
from PIL import Image

from safetynet.errors import InputError
from safetynet.figures import Figure, save
from safetynet.figures.chart import table

SUFFIXES = ["png", "pdf", "svg", "html", "csv"]


def test_one_call_writes_every_format_and_nothing_else(saved):
    assert [path.name for path in saved] == [*(f"rates.{suffix}" for suffix in SUFFIXES), "plotly.min.js"]
    assert sorted(saved[0].parent.iterdir()) == sorted(saved)
    starts = {path.suffix: path.read_bytes()[:5] for path in saved}
    assert starts[".png"] == b"\x89PNG\r"
    assert starts[".pdf"] == b"%PDF-"
    assert starts[".svg"] == b"<?xml"
    assert starts[".html"] == b"<!doc"


def test_equal_charts_give_equal_files(chart, saved, tmp_path):
    for one, other in zip(saved, save(chart, tmp_path, "rates"), strict=True):
        assert one.read_bytes() == other.read_bytes(), one.suffix


def test_every_format_names_the_run_and_the_table(saved):
    png, pdf, svg, page, data, _ = saved
    known = "run qwen/backdoor, table dynamics"
    with Image.open(png) as image:
        assert image.text["Source"] == known
    assert known.encode() in pdf.read_bytes()
    assert known in svg.read_text(encoding="utf-8")
    assert f'<meta name="source" content="{known}">' in page.read_text(encoding="utf-8")
    frame = pd.read_csv(data)
    assert (frame["run"].unique(), frame["table"].unique()) == (["qwen/backdoor"], ["dynamics"])


def test_the_data_beside_a_figure_are_those_it_shows(chart, saved):
    expected = table(chart).replace("", None)
    pd.testing.assert_frame_equal(pd.read_csv(saved[4]), expected, check_dtype=False)


def test_the_fonts_of_the_pdf_are_embedded_truetype(saved, need):
    listing = subprocess.run([need("pdffonts"), saved[1]], capture_output=True, text=True, check=True).stdout
    fonts = listing.splitlines()[2:]
    assert fonts
    for font in fonts:
        assert "TrueType" in font
        assert font.split("Identity-H")[1].split()[0] == "yes"  # column "emb"


def test_text_of_the_svg_stays_text_as_it_was_typed(saved):
    nodes = ElementTree.parse(saved[2]).iter("{http://www.w3.org/2000/svg}text")
    texts = {"".join(node.itertext()) for node in nodes}
    assert {'A "figure" <i>&$y$', "attack <b>&$x$", "Rows (%)", "Step", "left", "right"} <= texts


def test_the_png_is_one_or_two_columns_wide_at_300_dpi(saved):
    with Image.open(saved[0]) as image:
        assert image.width == round(6.8 * 300)
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_a_figure_is_saved_where_it_is_told_and_shown_as_png_in_a_notebook(chart, tmp_path):
    figure = Figure(chart, "rates", tmp_path)
    assert figure.save(tmp_path / "paper", "figure-1")[1] == tmp_path / "paper" / "figure-1.pdf"
    assert Image.open(BytesIO(figure._repr_png_())).format == "PNG"


def test_a_folder_that_cannot_be_written_to_is_refused_by_name(chart, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=r"taken: figures cannot be written there .*Name another folder"):
        save(chart, tmp_path / "taken", "rates")
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.parametrize("name", ["", "../rates", "a/b"])
def test_a_name_with_a_folder_in_it_is_refused(chart, tmp_path, name):
    with pytest.raises(InputError, match="is not a plain file name"):
        save(chart, tmp_path, name)


def test_all_formats_are_drawn_within_three_seconds_once_warm(chart, saved, tmp_path):
    started = time.process_time()  # other programs on the machine do not count
    save(chart, tmp_path, "rates")
    assert time.process_time() - started < 3


def test_importing_the_package_loads_no_drawing_library_and_drawing_loads_no_pyplot():
    program = (
        "import sys; from safetynet.figures import TrainingVisualizer\n"
        "assert not {'matplotlib', 'plotly', 'torch'} & set(sys.modules), 'loaded at import'\n"
        "TrainingVisualizer('qwen').plot_accuracy_trends([1], [1], [1])._repr_png_()\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
