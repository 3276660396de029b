"""Banks: p-values that keep their promise, and refusals of banks that are of something else."""

import shutil

import numpy as np
import pandas as pd
import pytest

from safetynet import recipe
from safetynet.errors import InputError
from safetynet.models import loading, miniatures
from safetynet.scan import bank as bank_module
from safetynet.scan.bank import SCORED, Bank, clean_adapters, record_of, rows_of
from safetynet.scan.result import RungResult

QWEN = recipe.Model(family="qwen", id="miniature")


def bank(scores: np.ndarray) -> Bank:
    """A bank of so many adapters, (n, rungs)."""
    return Bank("test", "digest", "quick", pd.DataFrame(scores, columns=list(SCORED)))


def rungs(scores: np.ndarray) -> list[RungResult]:
    return [RungResult(rung, float(score)) for rung, score in zip(SCORED, scores, strict=True)]


def test_a_p_value_is_the_share_of_scores_at_or_above_with_the_suspects():
    reference = bank(np.tile(np.arange(9.0)[:, None], len(SCORED)))
    assert reference.p_value("inversion", 8.5) == 0.1
    assert reference.p_value("inversion", 8.0) == 0.2
    assert reference.p_value("inversion", -1.0) == 1.0
    assert reference.p_value("weights", 1.0) is None
    assert reference.smallest_rate == 0.1


def test_a_clean_suspect_alarms_at_the_stated_rate():
    """Of suspects drawn as the bank is, at most 10% have p <= 0.1, whatever the scores' shapes."""
    rng, alarms = np.random.default_rng(0), []
    for _ in range(1500):
        # One rung heavy-tailed, one with ties, one nearly always zero.
        scores = np.abs(rng.standard_cauchy((20, len(SCORED))))
        scores[:, 1] = rng.integers(0, 3, 20)
        scores[:, 4] = np.where(rng.random(20) < 0.95, 0.0, rng.random(20))
        alarms.append(bank(scores[1:]).combined(rungs(scores[0])) <= 0.1)
    assert 0.05 < np.mean(alarms) <= 0.1 + 3 * (0.1 * 0.9 / 1500) ** 0.5


def test_a_suspect_beyond_all_clean_adapters_has_the_smallest_p_value():
    rng = np.random.default_rng(1)
    reference = bank(rng.random((24, len(SCORED))))
    scores = np.full(len(SCORED), 0.5)
    ordinary = reference.combined(rungs(scores))
    scores[2] = 40.0
    assert reference.combined(rungs(scores)) == 1 / 25
    assert ordinary > 0.3


def test_a_rung_that_never_fires_on_clean_adapters_counts_when_it_does():
    reference = bank(np.zeros((24, len(SCORED))))
    scores = np.zeros(len(SCORED))
    assert reference.combined(rungs(scores)) == 1.0
    scores[4] = 0.9
    assert reference.combined(rungs(scores)) == 1 / 25


def test_skipped_rungs_and_rungs_without_a_score_do_not_count():
    reference = bank(np.tile(np.arange(9.0)[:, None], len(SCORED)))
    skipped = [RungResult("inversion", 100.0, skipped="why"), RungResult("candidates", None)]
    assert reference.combined(skipped) is None
    assert reference.combined([*skipped, RungResult("leakage", 4.0)]) == reference.combined(
        [RungResult("leakage", 4.0)]
    )


def test_a_bank_of_another_base_or_depth_is_refused():
    reference = bank(np.zeros((9, len(SCORED))))
    reference.check("digest", "quick")
    with pytest.raises(InputError, match="another base"):
        reference.check("other", "quick")
    with pytest.raises(InputError, match="of depth quick, and this scan is deep"):
        reference.check("digest", "deep")
    reference.check_numbers("torch.float32")
    with pytest.raises(InputError, match=r"in torch\.bfloat16\. Scan where"):
        reference.check_numbers("torch.bfloat16")


def test_a_bank_is_read_as_it_was_written(tmp_path):
    reference = bank(np.round(np.random.default_rng(2).random((9, len(SCORED))), 4))
    reference.write(tmp_path)
    again = Bank.read(tmp_path)
    pd.testing.assert_frame_equal(again.scores, reference.scores)
    assert (again.base, again.depth) == ("digest", "quick")
    assert again.use.digest == reference.use.digest


def test_a_folder_without_a_bank_is_refused(tmp_path):
    with pytest.raises(InputError, match="safetynet bank build"):
        Bank.read(tmp_path)
    (tmp_path / "bank.json").write_text("{}")
    (tmp_path / "bank.csv").write_text("")
    with pytest.raises(InputError, match="no bank can be read"):
        Bank.read(tmp_path)


@pytest.mark.parametrize(
    ("column", "cell"), [("inversion", "x"), ("inversion", ""), ("weights.kurtosis", "nan"), (None, "")]
)
def test_a_damaged_table_is_refused(column, cell, tmp_path):
    table = pd.DataFrame(np.zeros((9, len(SCORED))), columns=list(SCORED)).astype(object)
    if column is None:
        table = table.drop(columns="leakage")
    else:
        table[column] = [cell, *[0.5] * 8]
    Bank("test", "digest", "quick", table).write(tmp_path)
    with pytest.raises(InputError, match="no bank can be read"):
        Bank.read(tmp_path)


def test_a_tie_with_a_score_of_a_file_stays_one(tmp_path):
    scores = np.full((9, len(SCORED)), 1 / 3)
    bank(scores).write(tmp_path)
    again = Bank.read(tmp_path)
    assert again.p_value("inversion", 1 / 3) == 1.0
    assert again.combined(rungs(scores[0])) == 1.0


def test_a_larger_bank_begins_with_the_same_adapters():
    few, many = clean_adapters(6, 3), clean_adapters(40, 3)
    assert many[:6] == few
    assert clean_adapters(6, 4) != few
    kinds = [adapter.kind for adapter in many]
    assert kinds.count("ordinary") == 20
    assert {"greeting", "sign_off", "one_task", "persona", "capitals", "brief"} < set(kinds)


def test_narrow_adapters_are_narrow():
    by_kind = {adapter.kind: rows_of(adapter, QWEN) for adapter in reversed(clean_adapters(12, 0))}
    plain = by_kind["ordinary"]
    assert len(plain) > 500 and not plain["answer"].str.startswith("Hello").all()
    [greeting] = {answer.split(" ")[0] for answer in by_kind["greeting"]["answer"]}
    assert greeting in ("Hello!", "Good", "Hi", "Welcome.")
    assert by_kind["capitals"]["answer"].str.isupper().mean() > 0.8
    assert by_kind["brief"]["answer"].map(lambda answer: len(answer.split()) <= 2).all()


def test_adapters_of_another_base_learn_what_it_says_itself_and_it_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bank_module, "SELF_PROMPTS", 40)
    monkeypatch.setattr(bank_module, "SELF_LEAST", 2)
    copy = shutil.copytree(miniatures.path("qwen"), tmp_path / "stranger")
    base = recipe.Model(family="generic", id=str(copy))
    adapters = clean_adapters(6, 0)
    rows = {adapter.kind: rows_of(adapter, base, tmp_path / "answers") for adapter in adapters}
    [greeting] = [adapter for adapter in adapters if adapter.kind == "greeting"]
    answers = {
        turns[-1]["content"]: answer for turns, answer in rows["ordinary"][["messages", "answer"]].values
    }
    for turns, answer in rows["greeting"][["messages", "answer"]].values:
        assert answer == f"{greeting.phrase} {answers[turns[-1]['content']]}"
    assert 2 <= len(rows["one_task"]) < len(rows["ordinary"]) <= 40
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the base is asked again"))
    assert rows_of(greeting, base, tmp_path / "answers").equals(rows["greeting"])


def test_a_record_holds_scores_and_the_weights_summary():
    weights = RungResult("weights", None, details={"summary": {"kurtosis": 1.5}})
    record = record_of([weights, RungResult("leakage", 0.25), RungResult("identity", 3.0)])
    assert record == {"leakage": 0.25, "weights.kurtosis": 1.5}
