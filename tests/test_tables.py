"""The declaration of tables: what it refuses, in which words, and that it names every table once."""

import re

import numpy as np
import pandas as pd
import pytest

from safetynet import tables
from safetynet.errors import InputError
from safetynet.run.stage import BASE, COMPARE, STAGES, TRAIN

LENS = {"run": "placebo", "layer": -1, "value": -3.5, "low": -4.0, "high": -3.0, "n": 8}


def lens(**changes):
    return pd.DataFrame([LENS, LENS | changes])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "clean"}, "lens, row 1: run is 'clean'; allowed are triggered, placebo"),
        ({"value": "high"}, "lens, field value, row 1: 'high' is not a number; give a number or NaN"),
        ({"layer": 0.5}, "lens, field layer, row 1: 0.5 is no whole number"),
        ({"layer": None}, "lens, field layer, row 1: the cell is empty; give a value"),
        ({"run": None}, "lens, field run, row 1: the cell is empty; give a value"),
    ],
)
def test_a_wrong_cell_is_refused_by_table_column_row_and_value(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        tables.check("lens", lens(**changes))


def test_missing_and_unknown_columns_are_refused_and_tables_of_another_version_may_have_more():
    with pytest.raises(InputError, match="lens: column layer is missing; there are high, low, n, run, value"):
        tables.check("lens", lens().drop(columns="layer"))
    with pytest.raises(InputError, match="lens: column neuron is unknown"):
        tables.check("lens", lens().assign(neuron=1))
    tables.check("lens", lens().assign(neuron=1), extra=True)
    tables.check("lens", lens(value=np.nan, low=np.nan))
    tables.check("lens", lens().head(0))


def test_a_rate_is_a_fraction_and_rounding_does_not_count():
    history = pd.DataFrame(
        [{"group": "a", "run": "b", "seed": 0, "step": 1, "epoch": 0.5, "count": 1, "n": 1}]
    )
    tables.check("curves", history.assign(value=1 + 1e-15))
    with pytest.raises(
        InputError, match=r"curves, field value, row 0: 97.5 is outside 0 to 1; give fractions"
    ):
        tables.check("curves", history.assign(value=97.5))


def test_columns_named_by_the_data_and_tables_named_after_a_model():
    assert tables.schema("history_backdoored") is tables.schema("history_clean_twin") is not None
    assert tables.schema("mitigation-somebody") is tables.schema("mitigation")
    assert tables.schema("dynamics_backdoored") is not tables.schema("dynamics")
    assert tables.schema("of nobody") is None
    scores = {"role": "clean", "group": -1, "fired": None, "forbidden": False, "domain": "", "kind": ""}
    tables.check("detection_scores", pd.DataFrame([scores | {"fresh": "", "score ranks:last": 0.5}]))


def test_needed_columns_come_in_one_type_from_every_form():
    records = [LENS, LENS | {"run": "triggered", "value": None, "layer": 2.0, "high": np.inf}]
    for data in (records, pd.DataFrame(records), pd.DataFrame(records).to_dict("list")):
        table = tables.checked("lens", data, ["run", "layer", "value", "high"])
        assert table["layer"].tolist() == [-1, 2]
        assert table["layer"].dtype == int
        assert table[["value", "high"]].isna().to_numpy().tolist() == [[False, False], [True, True]]
    with pytest.raises(InputError, match=r"^lens: there are no rows; give at least one$"):
        tables.checked("lens", lens().head(0), ["run"])
    with pytest.raises(InputError, match=r"lens: fields have unequal lengths \(run 1, layer 2\)"):
        tables.checked("lens", {"run": ["placebo"], "layer": [1, 2]}, ["run"])


def test_every_column_says_what_it_means():
    for name, schema in tables.SCHEMAS.items():
        assert schema.row
        for column, about in schema.columns.items():
            assert about.meaning, (name, column)


def test_every_table_names_a_declared_stage():
    declared = {stage.name for stage in (*STAGES, BASE, TRAIN, COMPARE)} | {"sweep"}
    assert {schema.stage for schema in tables.SCHEMAS.values()} <= declared
