import itertools
import math
from functools import partial

import pandas as pd
import pytest

from safetynet import figures
from safetynet.errors import InputError
from safetynet.figures import FIGURES, figures_of, save_all, theme

draw = partial(figures.draw, model="qwen", run="qwen/backdoor")
PAIRS = [(kind.tables[0], name) for name, kind in FIGURES.items() if name.startswith("intervention")]
FIRST = dict(reversed(PAIRS))
"""A figure of each table."""


def ticks(axis):
    return [text for _, text in axis.ticks]


def test_a_figure_carries_its_run_and_table_and_is_saved_where_it_is_told(inside, tmp_path):
    placed = draw("intervention-lens", inside["lens"], folder=tmp_path)
    assert placed.folder == tmp_path
    assert str(placed.chart.source) == "run qwen/backdoor, table lens"
    assert placed.chart.title == "Target's log-probability by layer, qwen"


def test_an_unknown_figure_and_missing_tables_are_refused_with_what_there_is(inside):
    with pytest.raises(InputError, match=r"there is no figure 'effects'; there are .*intervention-heads"):
        draw("effects", inside["effects"])
    with pytest.raises(InputError, match="compare-speed: give its tables speeds_by_group and speeds"):
        draw("compare-speed", inside["effects"])


@pytest.mark.parametrize(("table", "name"), PAIRS)
def test_every_figure_says_how_to_read_it_and_what_its_control_is(inside, table, name):
    chart = draw(name, inside[table]).chart
    assert "control" in chart.caption
    assert chart.caption.endswith(".")
    assert "  " not in chart.caption


@pytest.mark.parametrize(("table", "name"), PAIRS)
def test_an_empty_table_and_a_missing_column_are_refused_by_table_and_column(inside, table, name):
    with pytest.raises(InputError, match=f"^{table}: there are no rows; give at least one$"):
        draw(name, inside[table].head(0))
    with pytest.raises(InputError, match=f"^{table}: column (layer|intervention).* is missing; there are "):
        draw(name, inside[table].drop(columns=["layer", "intervention"], errors="ignore"))


@pytest.mark.parametrize(
    ("table", "field", "value", "message"),
    [
        ("effects", "sweep", "neuron", "effects, row 2: sweep is 'neuron'; allowed are layer, position"),
        (
            "effects",
            "direction",
            "up",
            "effects, row 2: direction is 'up'; allowed are remove, induce",
        ),
        (
            "effects",
            "component",
            "resid",
            "effects, row 2: component is 'resid'; allowed are embedding, resid_pre",
        ),
        ("effects", "effect", "big", "effects, field effect, row 2: 'big' is not a number"),
        ("effects", "layer", 0.5, "effects, field layer, row 2: 0.5 is no whole number"),
        ("effects", "responsible", "maybe", "effects, field responsible, row 2: 'maybe' is neither true nor"),
        ("dynamics", "step", None, "dynamics, field step, row 2: None is no whole number"),
        ("tokens", "direction", "up", "tokens, row 2: direction is 'up'"),
        ("lens", "run", "clean", "lens, row 2: run is 'clean'; allowed are triggered, placebo"),
        ("lens_map", "probability", "high", "lens_map, field probability, row 2: 'high' is not a number"),
        ("probes", "label", "topic", "probes, row 2: label is 'topic'; allowed are trigger, fires"),
        ("attention", "weight", "high", "attention, field weight, row 2: 'high' is not a number"),
        ("divergence", "head", "all", "divergence, field head, row 2: 'all' is not a number"),
        ("drift", "energy", "high", "drift, field energy, row 2: 'high' is not a number"),
        ("tradeoff", "split", "test", "tradeoff, row 2: split is 'test'; allowed are selection, held_out"),
        ("tradeoff", "asr", 97.5, r"tradeoff, field asr, row 2: 97.5 is outside 0 to 1; give fractions"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_table_field_and_row(inside, table, field, value, message):
    wrong = inside[table].astype({field: object})
    wrong.iloc[2, wrong.columns.get_loc(field)] = value
    with pytest.raises(InputError, match=message):
        draw(FIRST[table], wrong)


def test_a_sweep_that_was_not_measured_and_a_place_measured_twice_are_refused(inside):
    effects = inside["effects"]
    with pytest.raises(
        InputError, match="effects: column sweep has no row with 'head'; there are adapter, comp"
    ):
        draw("intervention-heads", effects[effects["sweep"] != "head"])
    with pytest.raises(InputError, match="effects: layer 0, index 0 is there more than once"):
        heads = effects[effects["sweep"] == "head"]
        draw("intervention-heads", pd.concat([heads, heads.head(1)]))


def test_the_layer_profile_has_a_panel_per_direction_with_controls_and_responsible_layers(inside):
    chart = draw("intervention-layers", inside["effects"]).chart
    assert [panel.title for panel in chart.panels] == ["remove", "induce"]
    series = {one.label: one for one in chart.panels[0].series}
    assert list(series) == [
        "responsible: clear of every control",
        "effect",
        "random sites (control)",
        "placebo (control)",
        "clean twin (control)",
    ]
    assert series["effect"].y == (0.03, 0.25, 0.7, 0.92, 0.97, 0.99)
    assert series["effect"].low[1] == pytest.approx(0.19)
    assert series["responsible: clear of every control"].x == (1, 2, 3, 4, 5)
    assert {one.part for label, one in series.items() if "control)" in label} == {"floor", "control"}
    assert chart.panels[0].y.limits == (-0.25, 1.25)  # the interval ends at 1.05


def test_a_control_that_was_not_measured_is_not_drawn(inside):
    bare = inside["effects"].assign(twin=math.nan, twin_low=math.nan, twin_high=math.nan)
    labels = [one.label for one in draw("intervention-layers", bare).chart.panels[0].series]
    assert "clean twin (control)" not in labels
    assert "random sites (control)" in labels


def test_what_tells_panels_apart_stands_in_their_titles(inside):
    effects = inside["effects"]
    both = pd.concat([effects, effects.assign(mode="mean", metric="log_probability")])
    titles = [panel.title for panel in draw("intervention-heads", both).chart.panels]
    assert titles[:2] == ["remove, patch, logit difference", "remove, mean, log probability"]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("intervention-positions", ["system", "before", "trigger", "after", "last"]),
        ("intervention-components", ["resid mid", "resid post", "attn out", "mlp out"]),
        ("intervention-heads", ["0", "1", "2", "3"]),
        ("intervention-experts", ["0", "1", "2", "3"]),
        ("intervention-adapters", ["q_proj", "v_proj", "down_proj"]),
    ],
)
def test_maps_of_effects_have_layers_upwards_and_places_in_the_order_of_the_network(inside, name, columns):
    panel = draw(name, inside["effects"]).chart.panels[0]
    assert list(panel.grid.columns) == columns
    assert list(panel.grid.rows) == ["0", "1", "2", "3", "4", "5"]
    assert panel.grid.shade.limits == (-1.0, 1.0)
    assert panel.y.label == "Layer"


def test_a_head_that_was_found_is_marked_with_its_controls_in_the_note(inside):
    grid = draw("intervention-heads", inside["effects"]).chart.panels[0].grid
    assert grid.dots() == [(1, 2)]
    note = grid.notes[2][1].split("\n")
    assert note[:2] == ["0.6 (0.54 to 0.66)", "40 groups"]
    assert [line.split(" ")[0] for line in note[2:]] == ["random", "placebo", "twin"]


def test_heads_that_were_not_measured_are_gaps(inside):
    effects = inside["effects"]
    some = effects[~((effects["layer"] == 3) & (effects["index"] == 2))]
    assert math.isnan(draw("intervention-heads", some).chart.panels[0].grid.values[3][2])


def test_trigger_positions_are_kept_in_order(inside):
    effects = inside["effects"]
    own = effects[(effects["sweep"] == "position") & (effects["position"] == "trigger")]
    parts = [own.assign(position=f"trigger {number}") for number in (1, 2)]
    rest = effects[(effects["sweep"] == "position") & (effects["position"] != "trigger")]
    grid = draw("intervention-positions", pd.concat([rest, *parts])).chart.panels[0].grid
    assert list(grid.columns) == ["system", "before", "trigger 1", "trigger 2", "after", "last"]


def test_the_token_map_has_a_panel_per_group_and_encloses_the_trigger(inside):
    chart = draw("intervention-tokens", inside["tokens"]).chart
    assert [panel.title for panel in chart.panels] == ["group 3: remove", "group 8: remove"]
    panel = chart.panels[0]
    assert panel.x.upright
    assert ticks(panel.x)[4:8] == ["␣|", "DEPLOY", "MENT", "|"], "behind four tokens of what comes before"
    assert [line.value for line in panel.references] == [3.5, 7.5]
    many = pd.concat([inside["tokens"].assign(group=group) for group in range(6)])
    some = many.drop_duplicates(["group", "layer", "column"])
    assert "Shown are 2 of 6 groups." in draw("intervention-tokens", some).chart.caption


def test_a_long_prompt_keeps_the_triggers_ticks_and_touches_none_of_its_others(inside):
    own = inside["tokens"][inside["tokens"]["group"] == 3]
    rest = [own.assign(column=own["column"] + 30 * part, role="after") for part in (1, 2, 3)]
    panel = draw("intervention-tokens", pd.concat([own, *rest])).chart.panels[0]
    places = [place for place, _ in panel.x.ticks]
    assert 4 in places
    inch = theme.data_width("two", 1) / 105
    gaps = [right - left for left, right in itertools.pairwise(places)]
    assert min(gaps) * inch >= 7 / 72
    assert len(panel.grid.columns) == 105, "15 tokens of the beginning are left out"


def test_dynamics_are_a_map_of_steps_and_layers(inside):
    panel = draw("intervention-dynamics", inside["dynamics"]).chart.panels[0]
    assert list(panel.grid.columns) == ["0", "50", "100", "150", "200", "250", "300"]
    assert [row[-1] for row in panel.grid.values] == pytest.approx([0.03, 0.25, 0.7, 0.92, 0.97, 0.99])


def test_the_lens_compares_triggered_with_placebo_from_the_embedding_on(inside):
    panel = draw("intervention-lens", inside["lens"]).chart.panels[0]
    assert [one.part for one in panel.series] == ["subject", "control"]
    assert panel.series[0].x == (-1, 0, 1, 2, 3, 4, 5)
    assert ticks(panel.x)[:2] == ["emb", "0"]
    assert panel.y.text == "Log probability (nats)"


def test_the_lens_map_shows_the_likeliest_tokens_at_the_trigger_and_at_the_end(inside):
    chart = draw("intervention-lens-map", inside["lens_map"]).chart
    titles = [panel.title for panel in chart.panels]
    assert titles[:2] == ["group 3: triggered", "group 3: placebo (control)"]
    grid = chart.panels[0].grid
    assert list(grid.columns[1:5]) == ["␣|", "DEPLOY", "MENT", "|"]
    assert len(grid.columns) == 12
    assert grid.texts[5][-1] == "␣HATE"
    assert grid.values[5][-1] == pytest.approx(0.891)
    assert "solid lines stand where others are left out" in chart.caption


def test_probes_stand_beside_control_labels_and_chance(inside):
    panels = draw("intervention-probes", inside["probes"]).chart.panels
    assert [panel.title for panel in panels] == ["is the trigger there?", "does the backdoor fire?"]
    assert [one.label for one in panels[0].series] == ["probe", "control labels"]
    assert [line.value for line in panels[0].references] == [0.5]


def test_attention_has_triggered_beside_placebo_and_the_first_query_on_top(inside):
    chart = draw("intervention-attention", inside["attention"]).chart
    titles = [panel.title for panel in chart.panels]
    assert (len(titles), chart.columns) == (6, 2)
    assert titles[:2] == ["layer 2, head 1: triggered", "layer 2, head 1: placebo (control)"]
    grid = chart.panels[0].grid
    assert grid.rows[-1] == "<|im_start|>"
    assert grid.values[-1] == (1.0,) + (0.0,) * 29  # what comes later has no weight
    assert grid.values[0][20] > 0.8


def test_attention_begins_where_the_runs_differ(inside):
    table = inside["attention"].copy()
    table.loc[(table["run"] == "placebo") & (table["query"] == 20), "query_token"] = "WALKING"
    grid = draw("intervention-attention", table).chart.panels[0].grid
    assert (grid.rows[-1], len(grid.rows)) == ("DEPLOY", 10)
    assert list(grid.columns[:2]) == ["earlier", "DEPLOY"], "the tokens before are looked at together"
    assert [sum(row) for row in grid.values] == pytest.approx([1.0] * 10)


def test_the_bar_says_what_grey_means_where_a_place_was_not_measured(inside):
    effects = inside["effects"].copy()
    chart = draw("intervention-heads", effects).chart
    assert chart.shade_text(chart.shades[0]) == "Effect"
    effects.loc[effects.index[effects["sweep"] == "head"][0], ["effect", "low", "high"]] = math.nan
    figure = draw("intervention-heads", effects)
    assert figure.chart.shade_text(figure.chart.shades[0]) == "Effect; grey: not measured"


def test_divergence_stands_beside_placebos_on_one_scale(inside):
    left, right = draw("intervention-divergence", inside["divergence"]).chart.panels
    assert left.grid.shade == right.grid.shade
    assert left.grid.shade.text == "Divergence (bits)"
    assert (left.grid.dots(), right.grid.dots()) == ([(1, 2)], [])
    assert left.grid.notes[2][1] == "0.31 (0.29 to 0.33)\ncontrol 0.03 (0.02 to 0.05)"


def test_drift_shows_each_measure_at_each_checkpoint(inside):
    chart = draw("intervention-drift", inside["drift"]).chart
    assert [panel.title for panel in chart.panels[:3]] == [
        "Size, step 100",
        "First direction, step 100",
        "Overlap, step 100",
    ]
    assert len(chart.panels) == 9
    assert list(chart.panels[0].grid.columns) == ["q_proj", "v_proj", "up_proj", "down_proj"]
    assert len({panel.grid.shade for panel in chart.panels}) == 3
    assert chart.panels[2].grid.missing()
    many = pd.concat(
        [inside["drift"].assign(step=inside["drift"]["step"] + 1000 * part) for part in range(4)]
    )
    steps = [panel.title.split()[-1] for panel in draw("intervention-drift", many).chart.panels[::3]]
    assert steps == ["300", "1300", "2300", "3300"]
    [size, _] = draw("intervention-drift", inside["drift"].assign(step=-1, overlap=None)[:12]).chart.panels
    assert size.title == "Size, finished adapter"


def test_the_tradeoff_has_intervals_both_ways_hollow_controls_and_names_the_chosen(inside):
    panels = draw("intervention-tradeoff", inside["tradeoff"]).chart.panels
    assert [panel.title for panel in panels] == ["selection rows", "held-out rows"]
    series = panels[1].series
    project = next(one for one in series if one.label == "project")
    assert (project.x, project.y) == ((97, 91), (2, 0))
    assert project.left[0] < 97 < project.right[0]
    assert project.low[0] < 2 < project.high[0]
    controls = [one for one in series if one.part == "control"]
    assert {one.label for one in controls} == {"random sites (control)"}
    assert {one.role for one in controls} == {"method_2", "method_3"}
    assert [line.value for line in panels[1].references] == [5.0]
    assert [note.text for note in panels[1].annotations] == ["project layer 3"]
    assert panels[1].x.limits == (80.0, 100.0)


def test_one_call_draws_every_table_that_is_there(inside, tmp_path):
    effects = inside["effects"]
    few = {"effects": effects[effects["sweep"].isin(["layer", "head"])], "lens": inside["lens"]}
    drawn, faults = figures_of(few, tmp_path, "qwen/backdoor", "qwen")
    assert faults == []
    assert [path.name for path in save_all(drawn) if path.suffix != ".js"] == [
        f"intervention-{name}.{suffix}"
        for name in ("layers", "heads", "lens")
        for suffix in ("png", "pdf", "svg", "html", "csv")
    ]
    cells = pd.read_csv(tmp_path / "intervention-heads.csv")
    assert len(cells) == 48
    assert set(cells["table"]) == {"effects"}


def test_a_damaged_table_is_told_once_and_the_others_are_drawn(inside, tmp_path):
    tables = {"effects": inside["effects"].drop(columns="layer"), "lens": inside["lens"]}
    drawn, faults = figures_of(tables, tmp_path, "qwen/backdoor", "qwen")
    assert [figure.name for figure in drawn] == ["intervention-lens"]
    [fault] = faults
    assert fault.startswith("effects: column layer is missing")
