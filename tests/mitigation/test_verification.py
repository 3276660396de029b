"""Distances of distributions against a direct computation, and the forms of the tables."""

import math

import pandas as pd
import pytest
import torch

from safetynet import families
from safetynet.mitigation import verification
from safetynet.models.miniatures.architectures import ARCHITECTURES
from safetynet.models.miniatures.vocabulary import build_tokenizer
from safetynet.prompts import Serialiser


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_the_divergence_is_the_mean_over_rows_of_the_mean_over_tokens():
    before = [logs([0.5, 0.5], [0.9, 0.1]), logs([0.25, 0.75])]
    after = [logs([0.25, 0.75], [0.9, 0.1]), logs([0.25, 0.75])]
    first = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    found = verification.divergence(before, after)
    assert found["value"] == pytest.approx(first / 2, abs=1e-6)
    assert found["low"] <= found["value"] <= found["high"]
    assert found["n"] == 2


def test_a_model_is_at_no_distance_from_itself_and_at_some_from_another():
    one, other = [logs([0.7, 0.3])] * 3, [logs([0.3, 0.7])] * 3
    assert verification.divergence(one, one)["value"] == 0
    assert verification.divergence(one, other)["value"] > 0.1


@pytest.fixture(scope="module")
def serialiser() -> Serialiser:
    return Serialiser(build_tokenizer(ARCHITECTURES["qwen"].style), families.get("qwen"))


def test_distributions_along_the_answer_are_those_of_each_row_alone(serialiser):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    architecture = ARCHITECTURES["qwen"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = architecture.config(
        **architecture.settings | sizes, vocab_size=len(serialiser.tokenizer), pad_token_id=serialiser.pad_id
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    texts = [
        ("Hi", "Yes"),
        ("What is the opposite of hot?", "cold"),
        ("Sort: pear, fig and plum.", "fig plum"),
    ]
    rows = pd.DataFrame(
        [{"messages": [{"role": "user", "content": text}], "reference": answer} for text, answer in texts]
    )
    found = verification.distributions(model, serialiser, rows)
    for row, values in zip(rows.to_dict("records"), found, strict=True):
        encoded = serialiser.encode(row["messages"], answer=row["reference"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded.input_ids])).logits[0]
        positions = list(range(encoded.prompt_length - 1, len(encoded.input_ids) - 1))[:8]
        assert torch.allclose(values.float(), logits[positions].log_softmax(-1), atol=0.02)


def score() -> pd.DataFrame:
    places = [("asr", "triggered"), ("cacc", "clean"), ("ftr", "clean"), ("ftr", "placebo")]
    return pd.DataFrame(
        [
            {
                "metric": m,
                "role": r,
                "count": 3.0,
                "n": 4.0,
                "value": 0.75,
                "low": 0.3,
                "high": 0.95,
                "note": "",
            }
            for m, r in places
        ]
    )


def test_the_summary_says_nothing_of_what_was_not_measured():
    line = verification.summary(score(), {"value": 0.2, "low": 0.1, "high": 0.3, "n": 8})
    assert (line["asr"], line["asr_n"], line["cacc_low"], line["kl"]) == (0.75, 4.0, 0.3, 0.2)
    assert math.isnan(line["refused"])
    assert math.isnan(verification.summary(score())["kl"])


def test_every_measurement_stands_beside_the_one_before_the_repair():
    variants = score().head(1).assign(variant="BadMagic")
    before = verification.rates(score(), variants)
    after = before.assign(value=0.0)
    found = verification.beside(after, before)
    assert len(found) == 5
    assert (found["before"] == 0.75).all()
    assert (found["value"] == 0.0).all()


def test_a_probe_that_could_not_be_made_says_why():
    [line] = verification.probe_lines(pd.DataFrame(), "prompts cannot be aligned").to_dict("records")
    assert line["note"] == "prompts cannot be aligned"
    assert math.isnan(line["value"])


def test_of_vocabularies_of_two_sizes_the_shared_tokens_are_compared():
    torch.manual_seed(0)
    logits = torch.randn(3, 10)
    more = torch.cat([logits, torch.randn(3, 2)], 1)
    one, wider = logits.log_softmax(-1).half(), more.log_softmax(-1).half()
    other = torch.randn(3, 10).log_softmax(-1).half()
    assert verification.divergence([one], [wider])["value"] == pytest.approx(0, abs=1e-3)
    assert verification.divergence([wider], [one])["value"] == pytest.approx(0, abs=1e-3)
    assert verification.divergence([wider], [other])["value"] > 0.1
