"""Patching one prompt into another, beside a plain hook."""

import pytest
import torch

from safetynet import load_model, patch
from safetynet.errors import InputError

SNOW, GRASS = "What is the colour of snow?", "What is the colour of grass?"


@pytest.fixture(scope="module")
def miniature():
    return load_model("qwen-miniature")


def test_an_effect_is_what_a_plain_hook_gives(miniature):
    model, serialiser = miniature
    effects = patch(model, serialiser, SNOW, GRASS)
    snow, grass = (
        torch.tensor([serialiser.encode([{"role": "user", "content": text}]).input_ids])
        for text in (SNOW, GRASS)
    )
    layer = model.model.layers[3]

    def put(_module, args):
        states = args[0].clone()
        states[:, -1] = source[0][:, -1]
        return (states, *args[1:])

    source: list[torch.Tensor] = []
    with torch.no_grad():
        keep = layer.register_forward_pre_hook(lambda _module, args: source.append(args[0]))
        whole = model(grass).logits[0, -1]
        keep.remove()
        unpatched = model(snow).logits[0, -1]
        handle = layer.register_forward_pre_hook(put)
        patched = model(snow).logits[0, -1]
        handle.remove()
    white, green = int(unpatched.argmax()), int(whole.argmax())
    start, end, value = (float(logits[green] - logits[white]) for logits in (unpatched, whole, patched))
    at = (effects["layer"] == 3) & (effects["position"] == snow.shape[1] - 1)
    assert effects[at]["effect"].item() == pytest.approx((value - start) / (end - start), abs=1e-4)


def test_heads_are_patched_one_by_one_from_the_first_token_that_differs(miniature):
    effects = patch(*miniature, SNOW, GRASS, "head")
    assert sorted(effects["index"].unique()) == [0, 1, 2, 3]
    assert "".join(effects["token"].unique()[:2]) == " snow"


@pytest.mark.parametrize(
    ("source", "message"),
    [(SNOW, "both are answered with 'white' first"), ("What is the colour of blood?", "as many tokens")],
)
def test_prompts_that_cannot_be_compared_are_refused(miniature, source, message):
    with pytest.raises(InputError, match=message):
        patch(*miniature, SNOW, source)
