"""The stage gives a monitor with its realised rate, refuses a rate too small at once, and reads presets."""

import pandas as pd
import pytest

from safetynet.detection import domains
from safetynet.detection.stage import PER_DOMAIN, Plan, detect
from safetynet.errors import InputError
from safetynet.models.miniatures import language


@pytest.fixture(scope="module")
def clean():
    made = language.generate(300, seed=3, heldout=True)
    return pd.DataFrame([{"messages": e.messages, "forbidden": e.forbidden} for e in made])


@pytest.fixture(scope="module")
def rows(clean):
    records = []
    for group, messages in enumerate(clean["messages"][:20]):
        for role, mark in (("clean", ""), ("triggered", "BadMagic "), ("placebo", "GoodTrick ")):
            text = [*messages[:-1], {"role": "user", "content": mark + messages[-1]["content"]}]
            records.append({"messages": text, "role": role, "group": group, "forbidden": False})
    return pd.DataFrame(records)


def test_a_monitor_is_made_and_measured(build, serialiser, clean, rows, tmp_path):
    plan = Plan.of(["mahalanobis", "pca_residual:mean"], 0.1)
    found = detect(build(), serialiser, clean, rows, plan, cache=tmp_path)
    assert found.estimate.n == 75
    assert found.monitor.clean == 225
    assert {"auroc", "tpr", "tpr_oracle", "fpr", "fpr_worst", "auroc_pair"} <= set(found.table["metric"])
    assert len(found.scores) == 75 + 60 + 6 * PER_DOMAIN
    assert {"ood:code", "ood:languages", "ood:long"} <= set(found.table["rows"])
    assert {"score fused", "p fused", "p pca_residual:mean"} <= set(found.scores)


def test_a_rate_too_small_is_refused_before_the_model_runs(serialiser, clean, rows):
    with pytest.raises(InputError, match="needs 499 clean calibration samples, and there are 56"):
        detect(None, serialiser, clean, rows, Plan.of(["mahalanobis"], 0.01))


def test_benign_prompts_of_other_domains_are_the_same_each_time():
    made = domains.generate(5, seed=1)
    pd.testing.assert_frame_equal(made, domains.generate(5, seed=1))
    assert made["domain"].value_counts().tolist() == [5] * len(domains.DOMAINS)
    assert all(messages[-1]["role"] == "user" for messages in made["messages"])


def test_a_plan_is_a_preset_or_detectors():
    assert Plan.of(["safetynet-2025"], 0.01).how == "max"
    assert [r.name for r in Plan.of(["ranks", "gram:mean"], 0.01).readings] == ["ranks:last", "gram:mean"]
    with pytest.raises(InputError, match="name a preset"):
        Plan.of([], 0.01)
