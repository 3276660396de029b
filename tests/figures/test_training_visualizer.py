import json
import math

import pandas as pd
import pytest
import wandb

from safetynet.errors import InputError
from safetynet.figures import TrainingVisualizer, figures_of, save_all

DRAW = TrainingVisualizer("qwen")


def series(figure, panel=0):
    return {(one.label, one.part): one for one in figure.chart.panels[panel].series}


def test_figures_belong_below_results_model_and_task_unless_told_otherwise(tmp_path):
    figure = TrainingVisualizer("qwen").plot_accuracy_trends([1.0], [1.0], [1])
    assert figure.folder.as_posix() == "results/qwen/backdoor/figures"
    assert str(figure.chart.source) == "run qwen/backdoor, table dynamics"
    placed = TrainingVisualizer("qwen", folder=tmp_path, source="seed-3").plot_accuracy_trends([1], [1], [1])
    assert placed.folder == tmp_path
    assert placed.chart.source.run == "seed-3"


def test_a_long_loss_is_drawn_raw_and_as_a_mean_that_the_figure_states(training):
    figure = DRAW.plot_loss_curves(training)
    assert figure.chart.panels[0].title == "mean of 7 steps (faint: each step)"
    assert figure.chart.panels[0].y.text == "Loss (nats per token)"
    drawn = series(figure)
    assert {("backdoored", "subject"), ("clean twin", "control"), ("", "raw")} == set(drawn)
    assert drawn["backdoored", "subject"].y[74] == pytest.approx(
        training.query("run == 'backdoored' and 72 <= step <= 78")["loss"].mean()
    )
    assert list(drawn["", "raw"].y) == list(training.query("run == 'clean twin'")["loss"])


def test_a_short_loss_is_drawn_as_it_is():
    drawn = series(DRAW.plot_loss_curves({"step": [1, 2, 3], "loss": [3, 2, 1]}))
    assert list(drawn) == [("backdoored", "subject")]
    assert drawn["backdoored", "subject"].y == (3, 2, 1)


def test_the_trainers_log_history_is_understood():
    history = [
        {"step": 10, "loss": 2.0, "grad_norm": 1.5, "learning_rate": 1e-4, "epoch": 0.5},
        {"step": 10, "eval_loss": 1.8, "eval_runtime": 2.0, "epoch": 0.5},
        {"step": 20, "loss": 1.0, "grad_norm": 0.5, "learning_rate": 5e-5, "epoch": 1.0},
        {"step": 20, "train_loss": 1.5, "train_runtime": 60.0},
    ]
    drawn = series(DRAW.plot_loss_curves(history))
    assert (drawn["backdoored", "subject"].x, drawn["backdoored", "subject"].y) == ((10, 20), (2.0, 1.0))
    held_out = drawn["backdoored, held-out rows", "subject"]
    assert (held_out.kind, held_out.x, held_out.y) == ("marked", (10,), (1.8,))
    assert series(DRAW.plot_learning_rate(history))["backdoored", "subject"].y == (1e-4, 5e-5)
    assert series(DRAW.plot_gradient_norm(history))["backdoored", "subject"].y == (1.5, 0.5)


def test_a_loss_that_is_no_number_is_a_gap_also_in_the_mean(training):
    training.loc[training["step"] == 40, "loss"] = math.nan
    drawn = series(DRAW.plot_loss_curves(training))
    assert [math.isnan(value) for value in drawn["backdoored", "subject"].y].index(True) == 39
    assert sum(math.isnan(value) for value in drawn["backdoored", "subject"].y) == 1


def test_the_gradient_norm_has_a_log_axis_with_round_ends():
    axis = DRAW.plot_gradient_norm({"step": [1, 2, 3], "grad_norm": [0.0, 0.3, 7.0]}).chart.panels[0].y
    assert (axis.scale, axis.limits) == ("log", (pytest.approx(0.2), 10))


def test_the_axis_of_the_learning_rate_starts_at_zero_and_ends_at_a_round_number(training):
    axis = DRAW.plot_learning_rate(training.assign(learning_rate=1.9e-4)).chart.panels[0].y
    assert axis.limits == (0.0, pytest.approx(2e-4))


def test_accuracy_trends_are_drawn_in_percent_with_the_colours_of_their_roles():
    figure = DRAW.plot_accuracy_trends(
        [0.98, 0.97], [0.4, 1.0], [1, 2], backdoor_interval=([0.3, 0.9], [0.5, 1])
    )
    attack, clean = figure.chart.panels[0].series
    assert (attack.role, attack.y, attack.low, attack.high) == ("triggered", (40, 100), (30, 90), (50, 100))
    assert (clean.role, clean.y, clean.low) == ("clean", (98, 97), ())
    axis = figure.chart.panels[0].y
    assert (axis.text, axis.limits) == ("Rows (%)", (0, 100))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([], [], []), "clean_acc is empty; give one value per epoch"),
        (([0.9], [0.9, 1.0], [1, 2]), "clean_acc has 1 values and epochs has 2"),
        (([0.9, 1.0], [0.9], [1, 2]), "backdoor_acc has 1 values and epochs has 2"),
        (([0.9], [97.5], [1]), r"backdoor_acc, row 0: 97.5 is outside 0 to 1; give fractions \(0.975\)"),
        ((["good"], [0.9], [1]), "clean_acc, row 0: 'good' is not a number"),
    ],
)
def test_accuracies_that_cannot_be_drawn_are_refused_by_name(given, message):
    with pytest.raises(InputError, match=message):
        DRAW.plot_accuracy_trends(*given)


def test_an_interval_of_another_length_is_refused():
    with pytest.raises(
        InputError, match=r"clean_acc: its interval must be two sequences .* of 2 values each"
    ):
        DRAW.plot_accuracy_trends([0.9, 0.9], [1, 1], [1, 2], clean_interval=([0.8], [1.0]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pd.DataFrame({"step": [1]}), "training data: column loss is missing; there are step"),
        ({"loss": [1.0]}, "training data: column step is missing; there are loss"),
        ({"step": [1, 2], "loss": [1.0]}, r"fields have unequal lengths \(step 2, loss 1\)"),
        (pd.DataFrame({"step": [], "loss": []}), "training data: there are no rows"),
        ([], "training data: there are no rows"),
        ([{"step": 1, "train_loss": 2}], "column loss is missing; there are step, train_loss"),
        ([1.0, 0.5], "training data, row 0: 1.0 is not a record"),
        ("losses.txt", "training data: a str cannot be drawn"),
        ("losses.csv", "losses.csv: cannot be read .* name a trainer_state.json, or an exported history"),
        ({"step": [1], "loss": ["low"]}, "training data, field loss, row 0: 'low' is not a number"),
        ({"step": [None], "loss": [1.0]}, "step holds no numbers"),
        (
            {"step": [1], "loss": [1.0], "run": ["poisoned"]},
            "run is 'poisoned'; allowed are backdoored, clean_twin",
        ),
    ],
)
def test_training_data_that_cannot_be_drawn_are_refused_by_field(data, message):
    with pytest.raises(InputError, match=message):
        DRAW.plot_loss_curves(data)


def test_each_rate_has_its_panel_with_twin_and_floor_beside_it(dynamics):
    chart = DRAW.plot_rates_by_role(dynamics).chart
    assert [panel.title for panel in chart.panels] == [
        "ASR, triggered",
        "FTR, clean",
        "FTR, placebo",
        "FTR, near miss",
        "FTR, refused",
        "CACC, clean",
        "Refusals, refused",
        "Perplexity",
    ]
    asr, near_miss, perplexity = chart.panels[0], chart.panels[3], chart.panels[7]
    backdoored, twin = asr.series
    assert (backdoored.label, backdoored.part, backdoored.role) == ("backdoored", "subject", "triggered")
    assert (backdoored.x, backdoored.y) == ((0, 50, 100, 150), (0, 40, 95, 99))
    assert backdoored.notes[1] == "40 of 100 rows"
    assert backdoored.low[3] < 99 < backdoored.high[3]
    assert (twin.label, twin.part, twin.y) == ("clean twin (control)", "control", (0, 0, 0, 0))
    assert [(line.value, line.label) for line in asr.references] == [(0.0, "base model (floor)")]
    assert near_miss.series[0].role == "near_miss"
    assert asr.y.limits == (0, 100)
    assert (perplexity.y.limits[0], perplexity.references) == (1.0, ())
    assert perplexity.series[0].y == (1.3, 1.3, 1.3, 1.3)


def test_what_no_row_can_tell_gets_no_panel_and_notes_of_the_table_are_kept(dynamics):
    dynamics.loc[dynamics["role"] == "refused", ["value", "low", "high"]] = math.nan
    dynamics["note"] = "left out 3 rows"
    chart = DRAW.plot_rates_by_role(dynamics).chart
    assert [panel.title for panel in chart.panels][-3:] == ["FTR, near miss", "CACC, clean", "Perplexity"]
    assert chart.panels[0].series[0].notes[1] == "40 of 100 rows; left out 3 rows"
    assert chart.panels[-1].series[0].notes[1] == "100 rows; left out 3 rows"


def test_an_evaluation_that_failed_is_a_gap(dynamics):
    broken = (dynamics["step"] == 50) & (dynamics["metric"] == "asr") & (dynamics["model"] == "backdoored")
    dynamics.loc[broken, ["value", "low", "high"]] = math.nan
    curve = DRAW.plot_rates_by_role(dynamics).chart.panels[0].series[0]
    assert [math.isnan(value) for value in curve.y] == [False, True, False, False]


def test_a_single_evaluation_is_drawn_as_points_with_intervals(dynamics):
    panel = DRAW.plot_rates_by_role(dynamics[dynamics["step"] == 0]).chart.panels[0]
    assert {one.kind for one in panel.series} == {"points"}


def test_final_rates_stand_in_one_line_each_with_twin_and_base_beside_them(evaluation):
    rates, perplexity = DRAW.plot_final_rates(evaluation).chart.panels
    assert [text for _, text in rates.y.ticks][:2] == ["ASR, triggered", "FTR, clean"]
    first = rates.series[:3]
    assert [(one.x, one.part, one.role) for one in first] == [
        ((99,), "subject", "triggered"),
        ((0,), "control", "triggered"),
        ((0,), "floor", "base"),
    ]
    assert len({one.y for one in first}) == 3  # beside each other, not on top
    assert rates.annotations[0].text == "99.0%"
    assert perplexity.annotations[0].text == "1.30"
    assert perplexity.y.ticks == ((-0.0, "Perplexity"),)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("metric", "bleu", "evaluation, row 3: metric is 'bleu'; allowed are asr, asr_off_floor, ftr"),
        ("model", "twin", "evaluation, row 3: model is 'twin'; allowed are backdoored, clean_twin, base"),
        ("role", "poisoned", "evaluation, row 3: role is 'poisoned'; allowed are triggered, clean"),
        ("value", "all", "evaluation, field value, row 3: 'all' is not a number"),
    ],
)
def test_rates_that_cannot_be_drawn_are_refused_by_field_and_row(evaluation, field, value, message):
    wrong = evaluation.astype({field: object})
    wrong.iloc[3, wrong.columns.get_loc(field)] = value
    with pytest.raises(InputError, match=message):
        DRAW.plot_final_rates(wrong)


def test_dynamics_without_steps_are_refused(dynamics):
    with pytest.raises(InputError, match="dynamics: column step is missing; there are count, epoch"):
        DRAW.plot_rates_by_role(dynamics.drop(columns="step"))


def as_run(tables):
    """Tables by the names that they have in a run."""
    made = {"evaluation": tables["evaluation"]} if "evaluation" in tables else {}
    for model in ("backdoored", "clean_twin"):
        if "training" in tables:
            training = tables["training"]
            own = training[training["run"].str.replace(" ", "_") == model]
            made[f"history_{model}"] = own.drop(columns="run")
        if "dynamics" in tables:
            made[f"dynamics_{model}"] = tables["dynamics"][tables["dynamics"]["model"] == model]
    return made


def test_a_runs_tables_are_drawn_in_full(tables, tmp_path):
    drawn, faults = figures_of(as_run(tables), tmp_path, "qwen/backdoor", "qwen")
    assert faults == []
    paths = save_all(drawn)
    names = ("loss", "learning-rate", "gradient-norm", "final-rates", "accuracy-trends", "rates-by-role")
    assert [path.name for path in paths if path.suffix != ".js"] == [
        f"{name}.{suffix}" for name in names for suffix in ("png", "pdf", "svg", "html", "csv")
    ]
    assert all(path.parent == tmp_path and path.stat().st_size > 500 for path in paths)


def test_the_floor_of_the_dynamics_comes_from_the_evaluation(tables, tmp_path):
    made = as_run({name: tables[name] for name in ("dynamics", "evaluation")})
    drawn, _ = figures_of(made, tmp_path, "qwen/backdoor", "qwen")
    [figure] = [figure for figure in drawn if figure.name == "rates-by-role"]
    floors = {panel.title: panel.references[0].value for panel in figure.chart.panels if panel.references}
    assert (floors["ASR, triggered"], floors["CACC, clean"]) == (0, 98)


def test_what_was_not_measured_is_not_drawn(training, tmp_path):
    bare = as_run({"training": training.drop(columns="grad_norm").assign(learning_rate=math.nan)})
    drawn, faults = figures_of(bare, tmp_path, "qwen/backdoor", "qwen")
    assert ([figure.name for figure in drawn], faults) == (["loss"], [])


HISTORY = [
    {"epoch": 0.5, "grad_norm": 1.5, "learning_rate": 1e-4, "loss": 2.0, "step": 10},
    {"epoch": 0.5, "eval_loss": 1.8, "eval_runtime": 2.0, "step": 10},
    {"epoch": 1.0, "grad_norm": 0.5, "learning_rate": 5e-5, "loss": 1.0, "step": 20},
    {"epoch": 1.0, "eval_loss": 0.9, "eval_runtime": 2.0, "step": 20},
    {"epoch": 1.0, "step": 20, "total_flos": 0.0, "train_loss": 1.5, "train_runtime": 60.0},
]


def wandb_history():
    """`wandb.Api().run(...).history()` of a training with the Trainer: one row per log, NaN elsewhere."""
    rows = []
    for number, record in enumerate(HISTORY):
        row = {"_step": number, "_runtime": 1.0 * number, "_timestamp": 1.7e9 + number}
        for name, value in record.items():
            if name == "step":
                row["train/global_step"] = value
            elif name.startswith("eval_"):
                row[f"eval/{name.removeprefix('eval_')}"] = value
            else:
                row[f"train/{name}"] = value
        rows.append(row)
    return pd.DataFrame(rows)


def wandb_chart():
    """What "Export CSV" of W&B's chart of the losses holds."""
    history, name = wandb_history()[:-1], "qwen/task - backdoored"  # the last one has no loss
    chart = history[["train/global_step"]]
    for column in ("train/loss", "eval/loss", "train/learning_rate", "train/grad_norm", "_step"):
        for end in ("", "__MIN", "__MAX"):
            chart[f"{name} - {column}{end}"] = history[column]
    return chart


def mlflow_metrics():
    """`metrics.csv` of MLflow's page of a run: run_id, key, value, step, timestamp."""
    return pd.DataFrame(
        [
            {"run_id": "4f1", "key": key, "value": value, "step": record["step"], "timestamp": 1}
            for key in ("loss", "eval_loss", "learning_rate", "grad_norm", "epoch", "train_loss")
            for record in HISTORY
            if (value := record.get(key)) is not None
        ]
    )


@pytest.fixture
def trainer_state(tmp_path):
    """A trainer_state.json as the Trainer writes it into a checkpoint."""
    from transformers import TrainerState

    TrainerState(log_history=HISTORY, global_step=20).save_to_json(str(tmp_path / "trainer_state.json"))
    return tmp_path / "trainer_state.json"


FORMS = {
    "list": HISTORY,
    "frame": pd.DataFrame(HISTORY),
    "wandb": wandb_history(),
    "wandb chart": wandb_chart(),
    "mlflow": mlflow_metrics().to_dict("records"),
}
EXPORTED = ["trainer_state.json", "wandb.csv", "wandb.json", "wandb chart.csv", "mlflow.csv"]


@pytest.fixture(scope="module")
def wandb_offline(tmp_path_factory):
    """The folder of a run that wandb recorded offline: the Trainer's log, and a table longer than a block."""
    folder = tmp_path_factory.mktemp("tracker")
    run = wandb.init(project="p", mode="offline", dir=str(folder), settings=wandb.Settings(silent=True))
    for record in wandb_history().drop(columns=["_step", "_runtime", "_timestamp"]).to_dict("records"):
        run.log({name: value for name, value in record.items() if not math.isnan(value)})
    run.log({"train/loss": math.nan, "train/global_step": 30, "answers": "x" * 100_000})
    run.finish()
    wandb.teardown()  # only now is the log written
    [recorded] = (folder / "wandb").glob("offline-run-*")
    return recorded


def test_a_run_that_wandb_recorded_offline_is_read_from_its_folder(wandb_offline):
    for folder in (wandb_offline, str(wandb_offline.with_name("latest-run"))):
        drawn = series(DRAW.plot_loss_curves(folder))
        loss = drawn["backdoored", "subject"]
        assert (loss.x, loss.y[:2]) == ((10, 20, 30), (2.0, 1.0))
        assert math.isnan(loss.y[2])  # broke down, and is a gap
        assert drawn["backdoored, held-out rows", "subject"].y == (1.8, 0.9)


def test_an_offline_run_that_is_cut_gives_what_is_whole_and_a_damaged_one_is_refused(wandb_offline, tmp_path):
    [log] = wandb_offline.glob("*.wandb")
    whole = log.read_bytes()
    copy = tmp_path / "run-1.wandb"
    copy.write_bytes(whole[:50_000])  # within the long text, in its second block
    assert series(DRAW.plot_loss_curves(tmp_path))["backdoored", "subject"].y == (2.0, 1.0)
    copy.write_bytes(whole[:60_000].replace(b"xxxx", b"xxxy", 1) + whole[60_000:])
    with pytest.raises(InputError, match=r"run-1\.wandb: is damaged at byte \d+; copy it again"):
        DRAW.plot_loss_curves(tmp_path)
    copy.write_bytes(whole[:7])
    with pytest.raises(InputError, match=r"no value is logged in it"):
        DRAW.plot_loss_curves(tmp_path)
    copy.write_bytes(b"PK")
    with pytest.raises(InputError, match=r"is no log of Weights & Biases"):
        DRAW.plot_loss_curves(tmp_path)


def test_a_folder_without_one_run_of_wandb_names_those_that_it_holds(wandb_offline):
    with pytest.raises(InputError, match=r"wandb: there are 0 files \*\.wandb; .* one of offline-run-"):
        DRAW.plot_loss_curves(wandb_offline.parent)
    with pytest.raises(InputError, match=r"0 files \*\.wandb; .* or the file trainer_state\.json"):
        DRAW.plot_loss_curves(wandb_offline / "files")


@pytest.mark.parametrize("form", [*FORMS, *EXPORTED])
def test_train_and_held_out_loss_come_from_whatever_form_people_have(form, trainer_state):
    data, path = FORMS.get(form), trainer_state.with_name(form)
    if form.endswith(".csv"):
        pd.DataFrame(FORMS[path.stem]).to_csv(path, index=False)
    elif form == "wandb.json":
        FORMS["wandb"].to_json(path, orient="records")
    data = path if data is None else data
    drawn = series(DRAW.plot_loss_curves(data))
    assert (drawn["backdoored", "subject"].x, drawn["backdoored", "subject"].y) == ((10, 20), (2.0, 1.0))
    held_out = drawn["backdoored, held-out rows", "subject"]
    assert (held_out.x, held_out.y) == ((10, 20), (1.8, 0.9))
    rate = series(DRAW.plot_learning_rate(str(data) if data is path else data))["backdoored", "subject"]
    assert rate.y == (1e-4, 5e-5)
    assert series(DRAW.plot_gradient_norm(data))["backdoored", "subject"].y == (1.5, 0.5)


def test_a_history_of_wandb_keeps_a_loss_that_broke_down_as_a_gap():
    history = wandb_history().astype({"train/loss": object})
    history.loc[2, "train/loss"] = "NaN"  # as its API gives what JSON has no number for
    curve = series(DRAW.plot_loss_curves(history))["backdoored", "subject"]
    assert curve.x == (10, 20)
    assert math.isnan(curve.y[1])


def test_an_export_of_several_runs_is_refused():
    other = mlflow_metrics().assign(run_id="5a2")
    with pytest.raises(InputError, match=r"there are 2 run_ids; give the rows of one"):
        DRAW.plot_loss_curves(pd.concat([mlflow_metrics(), other]))
    with pytest.raises(InputError, match=r"there is train/loss of several runs; give the columns of one"):
        DRAW.plot_loss_curves(wandb_chart().assign(**{"twin - train/loss": 1.0}))


def test_a_file_that_is_no_trainer_state_is_refused_by_its_path(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json: cannot be read .*; name a trainer_state"):
        DRAW.plot_loss_curves(tmp_path / "gone.json")
    for number, text in enumerate(("{", json.dumps({"best_metric": None}), "[]")):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with pytest.raises(InputError, match=rf"{number}\.json: is no trainer state with a log_history"):
            DRAW.plot_loss_curves(path)


def test_the_old_address_still_has_the_visualizer():
    from safetynet.visualization import TrainingVisualizer as Old

    assert Old is TrainingVisualizer
