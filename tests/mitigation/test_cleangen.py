"""Reference-guided decoding in batches with caches, against its definition without either."""

import math

import pytest
import torch
from transformers import GenerationConfig

from safetynet.errors import InputError
from safetynet.mitigation.decoding import Guided
from safetynet.prompts import pad

MOST = 12


def step_by_step(model, base, ids, ratio, stops):
    """The definition: one prompt, no cache, a full pass of both models for each token."""
    answer: list[int] = []
    while len(answer) < MOST:
        line = torch.tensor([ids + answer])
        suspect, reference = (f(line).logits[0, -1].log_softmax(-1) for f in (model, base))
        token = int(suspect.argmax())
        if float(suspect[token] - reference[token]) > math.log(ratio):
            token = int(reference.argmax())
        answer.append(token)
        if token in stops:
            break
    return answer


@pytest.fixture(scope="module")
def prompts(planted, held_out):
    chosen = held_out[held_out["role"].isin(["triggered", "clean"])].head(10)
    return [planted.serialiser.encode(list(m)).input_ids for m in chosen["messages"]]


def answers(planted, prompts, front, **more):
    serialiser = planted.serialiser
    ids = pad(prompts, serialiser.pad_id, "left")
    mask = pad([[1] * len(p) for p in prompts], 0, "left")
    config = GenerationConfig(
        max_new_tokens=MOST, eos_token_id=serialiser.stop_ids, pad_token_id=serialiser.pad_id, **more
    )
    output = front.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    cut = []
    for row in output[:, ids.shape[1] :].tolist():
        ends = [i for i, token in enumerate(row) if token in serialiser.stop_ids]
        cut.append(row[: ends[0] + 1] if ends else row)
    return cut


@pytest.mark.parametrize("ratio", [1.5, 20.0, 1e6])
@torch.no_grad()
def test_a_batch_with_caches_equals_the_definition_token_for_token(planted, prompts, ratio):
    model = planted.model

    def base(line):
        with model.disable_adapter():
            return model(line)

    assert len({len(p) for p in prompts}) > 2
    wanted = [step_by_step(model, base, ids, ratio, planted.serialiser.stop_ids) for ids in prompts]
    for ahead in (1, 3, 4):
        assert answers(planted, prompts, Guided(model, None, ratio, ahead)) == wanted


def test_it_lies_between_the_suspect_and_the_base(planted, prompts):
    model = planted.model
    own = answers(planted, prompts, model)
    with model.disable_adapter():
        base = answers(planted, prompts, model)
    assert own != base
    assert answers(planted, prompts, Guided(model, None, math.inf, 4)) == own
    assert answers(planted, prompts, Guided(model, None, 0.0, 4)) == base


def test_another_model_can_be_the_reference(planted, prompts, merged):
    assert answers(planted, prompts, Guided(planted.model, merged, 1.5, 4)) == answers(
        planted, prompts, planted.model
    )


def test_sampling_is_refused(planted, prompts):
    with pytest.raises(InputError, match="cleangen: it answers greedily"):
        answers(planted, prompts, Guided(planted.model, None, 20, 4), do_sample=True)
