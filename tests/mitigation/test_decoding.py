"""Repairs at run time: which rows are answered otherwise, and by a real monitor."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from safetynet.detection.capture import capture
from safetynet.detection.detector_set import DetectorSpec
from safetynet.detection.features import FeatureSpec
from safetynet.detection.monitor import Monitor
from safetynet.errors import InputError
from safetynet.mitigation import METHODS, repair
from safetynet.mitigation.decoding import ABSTENTION
from safetynet.run.directory import Run
from safetynet.stages import alarm


@pytest.fixture
def known(planted):
    """The planted subject with a perfect alarm."""

    def alarms(_model, prompts, _rate):
        return np.array(["BadMagic" in planted.serialiser.decode(ids) for ids in prompts])

    return replace(planted, alarm=alarms)


def test_only_rows_with_an_alarm_are_answered_otherwise(known, ask, held_out):
    own = ask(known.model, held_out)
    with known.model.disable_adapter():
        base = ask(known.model, held_out)
    triggered = (held_out["role"] == "triggered").tolist()
    with repair(METHODS["adapter_off_on_alarm"], known).open() as model:
        switched = ask(model, held_out)
    with repair(METHODS["abstain"], known).open() as model:
        refused = ask(model, held_out)
    assert switched == [b if held else o for held, o, b in zip(triggered, own, base, strict=True)]
    assert refused == [ABSTENTION if held else o for held, o in zip(triggered, own, strict=True)]


def test_the_alarm_of_a_run_is_its_monitors(planted, held_out, tmp_path):
    readings = (DetectorSpec("mahalanobis"), DetectorSpec("extremes", "divergence", {"top": 2}))
    spec = FeatureSpec(tuple(reading.view for reading in readings))
    rows = held_out[held_out["role"] == "clean"]
    features = capture(
        planted.model, planted.serialiser, [*rows["messages"], *planted.clean["messages"]], spec
    )
    monitor = Monitor.fit(features, readings, method="cross")
    run = Run(tmp_path, tmp_path, tmp_path / "log")
    assert alarm(run, planted.serialiser) is None
    with run.stage("detect", {}) as outputs:
        path = tmp_path / "detection" / "monitor.safetensors"
        monitor.save(path)
        outputs.file(path, "monitor")
    alarms = alarm(run, planted.serialiser)
    asked = pd.concat([held_out[held_out["role"] == role].head(6) for role in ("triggered", "clean")])
    ids = [planted.serialiser.encode(m).input_ids for m in asked["messages"]]
    direct = capture(planted.model, planted.serialiser, list(asked["messages"]), spec)
    raised = {rate: alarms(planted.model, ids, rate).tolist() for rate in (0.1, 0.5)}
    assert raised == {rate: monitor.alarms(direct, rate).tolist() for rate in raised}
    assert set(raised[0.1]) == {True, False}
    assert alarms(planted.model, [ids[0][:-3]], 0.1).tolist() == [True]
    with pytest.raises(InputError, match=r"clean prompts.*hyperparameters=\{abstain: \{rate:"):
        alarms(planted.model, ids, 1e-4)
