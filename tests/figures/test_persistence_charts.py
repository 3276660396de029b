"""The figure of what a backdoor survives: steps that double, and a line for each other change."""

import pandas as pd
import pytest

from safetynet.errors import InputError
from safetynet.figures import draw
from safetynet.figures.saving import save_all
from safetynet.statistics import wilson


def line(change: str, setting: str, amount: float, asr: int, cacc: int | None = 19) -> dict[str, object]:
    known = {"change": change, "setting": setting, "amount": amount}
    for name, count in (("asr", asr), ("ftr", 1), ("cacc", cacc)):
        value, ends = (float("nan"),) * 2, ("", "_low", "_high")
        if count is not None:
            value = (count / 20, *wilson(count, 20))
        known |= dict(zip((name + end for end in ends), value, strict=False)) | {f"{name}_n": 20}
    return known


@pytest.fixture
def survival() -> pd.DataFrame:
    return pd.DataFrame(
        [
            line("as it is", "", 0, 20),
            *(line("further training", f"{n} steps", n, asr) for n, asr in ((1, 18), (2, 12), (4, 8))),
            line("merging", "into the base", 0, 20),
            line("quantisation", "4 bits", 4, 19),
            line("system prompt", "Speak to everybody as if they were kings and queens.", 0, 17),
            line("sampling", "5 samples at temperature 1", 1, 15, None),
        ]
    )


def test_steps_double_from_the_model_as_it_is_and_other_changes_have_a_line_each(survival):
    curves, dots = draw("persistence", survival).chart.panels
    assert [text for _, text in curves.x.ticks] == ["0", "1", "2", "4"]
    success = next(series for series in curves.series if series.label == "attack success")
    assert (success.x, success.y) == ((0, 1, 2, 3), (100, 90, 60, 40))
    assert [reference.value for reference in curves.references] == [50]
    names = [text for _, text in dots.y.ticks]
    assert names[:3] == ["as it is", "merging", "4 bits"]
    assert names[3].startswith("“Speak to everybody") and names[3].endswith("…")
    assert {series.part for series in dots.series} == {"subject", "control"}
    accuracy = next(series for series in dots.series if series.role == "clean")
    assert len(accuracy.x) == len(names)


def test_without_further_training_there_are_dots_alone_in_every_format(survival, tmp_path):
    figure = draw("persistence", survival[survival["change"] != "further training"], folder=tmp_path)
    [panel] = figure.chart.panels
    assert panel.title == "other changes"
    assert {path.suffix for path in save_all([figure])} >= {".png", ".pdf", ".svg", ".html", ".csv"}


def test_a_table_that_cannot_be_drawn_says_why(survival):
    with pytest.raises(InputError, match=r"persistence: column setting is missing"):
        draw("persistence", survival.drop(columns="setting"))
    with pytest.raises(InputError, match=r"persistence, row 0: change is 'asleep'; allowed are as it is"):
        draw("persistence", survival.assign(change="asleep"))
    with pytest.raises(InputError, match=r"persistence: change as it is, .* more than once"):
        draw("persistence", pd.concat([survival, survival.head(1)]))
