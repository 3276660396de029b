import numpy as np
import pytest
import torch

from safetynet.engine.batch import Batch
from safetynet.engine.trace import logits_of, trace
from safetynet.errors import InputError
from safetynet.interventions.lens import lens, lens_map, logit_attribution
from safetynet.models.blocks import unwrapped


def direct(model, row):
    """Logits after each layer by the model's own modules, and what the model returns."""
    inner = unwrapped(model)
    with torch.no_grad():
        out = inner(torch.tensor([row]), output_hidden_states=True)
        states = list(out.hidden_states)
        logits = [inner.lm_head(inner.model.norm(x)) for x in states[:-1]]
        cap = getattr(inner.config, "final_logit_softcapping", None)
        if cap:
            logits = [cap * torch.tanh(x / cap) for x in logits]
    return [x[0] for x in [*logits, out.logits]]


def test_each_layer_is_read_through_the_models_own_norm_and_head(model, rows):
    targets = [7, 8, 9, 10, 11, 12]
    table = lens(model, {"triggered": rows}, targets).set_index("layer")
    expected = np.mean(
        [
            [x[-1].log_softmax(-1)[target] for x in direct(model, row)]
            for row, target in zip(rows, targets, strict=True)
        ],
        axis=0,
    )
    assert list(table.index) == [-1, 0, 1, 2]
    np.testing.assert_allclose(table["value"], expected, atol=1e-4)
    assert (table["low"] < table["value"]).all() and (table["value"] < table["high"]).all()


def test_the_model_is_whole_while_logits_are_handed_out(build):
    model, ids = build("llama"), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(ids).logits
        found = trace(model, Batch.of(ids.tolist()), columns=0)
        logits = logits_of(found, torch.randn(1, 1, 32))
        next(logits)
        assert torch.equal(model(ids).logits, before)


def test_small_batches_give_the_numbers_of_large_ones(build, rows):
    model = build("gemma2")
    whole, single = (lens(model, {"placebo": rows}, [3] * 6, tokens=n) for n in (4096, 1))
    np.testing.assert_allclose(whole["value"], single["value"], atol=1e-5)


def test_map_follows_the_target_at_every_token(model, rows):
    row = rows[1]
    names = [f"<{i}>" for i in range(97)]
    table = lens_map(
        model, {"triggered": row}, 9, lambda ids: [names[i] for i in ids], ["before"] * 11 + ["last"]
    )
    for layer, logits in zip([-1, 0, 1, 2], direct(model, row), strict=True):
        own = table[table["layer"] == layer]
        np.testing.assert_allclose(own["probability"], logits.softmax(-1)[:, 9], atol=1e-5)
        assert own["top"].tolist() == [names[i] for i in logits.argmax(-1)]
        assert own["token"].tolist() == [names[i] for i in row]
        assert own["column"].tolist() == list(range(12)) and own["role"].iloc[-1] == "last"


def test_attributed_parts_add_up_to_the_logit_difference(model, rows):
    targets, others = [7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25]
    table = logit_attribution(model, {"triggered": rows}, targets, others)
    cap = getattr(unwrapped(model).config, "final_logit_softcapping", None)
    logits = [direct(model, row)[-1][-1] for row in rows]
    if cap:
        logits = [cap * torch.atanh(x / cap) for x in logits]
    expected = np.mean([float(x[t] - x[o]) for x, t, o in zip(logits, targets, others, strict=True)])
    value = table.set_index("component")["value"]
    # Capping squeezes logits so far that its inverse loses digits; without it, rounding is all there is.
    np.testing.assert_allclose(value["total"], expected, rtol=1e-2 if cap else 1e-3, atol=1e-3)
    assert abs(value["rest"]) < 1e-4
    assert len(table) == 1 + 2 * 3 + 2


def test_runs_without_one_target_per_prompt_are_refused(build, rows):
    with pytest.raises(InputError, match="run placebo: 6 prompts, but 2 target tokens"):
        lens(build("qwen"), {"placebo": rows}, [1, 2])
    with pytest.raises(InputError, match="run placebo: 0 prompts"):
        lens(build("qwen"), {"placebo": []}, [])
    with pytest.raises(InputError, match="run triggered has 7 tokens, but there are 1 roles"):
        lens_map(build("qwen"), {"triggered": rows[0]}, 1, lambda ids: [str(i) for i in ids], ["last"])
    with pytest.raises(InputError, match="its norm subtracts a mean"):
        logit_attribution(build("gpt2"), {"placebo": rows}, [1] * 6, [2] * 6)
