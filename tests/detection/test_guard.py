"""The guard answers as the model does, judges from the same pass, and acts on an alarm."""

import json

import numpy as np
import pytest
import torch

from safetynet.detection import passes as views_of_passes
from safetynet.detection.capture import capture
from safetynet.detection.detector_set import DetectorSpec
from safetynet.detection.features import FeatureSpec
from safetynet.detection.guard import Guard
from safetynet.detection.monitor import Monitor
from safetynet.detection.passes import SLIGHT
from safetynet.errors import InputError
from safetynet.models.miniatures import language

RATE = 0.2
TOKENS = 5


@pytest.fixture(scope="module")
def model(build):
    return build()


@pytest.fixture(scope="module")
def clean():
    return [example.messages for example in language.generate(120, seed=0, heldout=False)]


@pytest.fixture(scope="module")
def monitor(model, serialiser, clean):
    readings = [
        DetectorSpec("mahalanobis"),
        DetectorSpec("neighbours", "mean"),
        DetectorSpec("extremes", "divergence"),
        DetectorSpec("extremes", "unexplained"),
    ]
    views = (*(reading.view for reading in readings), "confidence", "steps", "step_confidence")
    features = capture(model, serialiser, clean, FeatureSpec(views, tokens=TOKENS))
    watch = [
        DetectorSpec("mahalanobis", "steps"),
        DetectorSpec("extremes", "step_confidence", {"two_sided": True}),
        DetectorSpec("lock", "step_confidence"),
    ]
    return Monitor.fit(features, readings, token_readings=watch)


@pytest.fixture(scope="module")
def prompt_monitor(model, serialiser, clean):
    features = capture(model, serialiser, clean, FeatureSpec(("last", "mean")))
    return Monitor.fit(
        features, [DetectorSpec("mahalanobis"), DetectorSpec("pca_residual", "mean")], method="cross"
    )


def alarmed(monitor, count=1):
    """Prompts of nothing but signs, which no clean prompt resembles."""
    return [[{"role": "user", "content": "?!" * (40 + i)}] for i in range(count)]


def plain(model, serialiser, messages):
    ids = torch.tensor([serialiser.encode(messages).input_ids])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
        eos_token_id=serialiser.stop_ids, pad_token_id=serialiser.pad_id,
    )  # fmt: skip
    new = output[0, ids.shape[1] :].tolist()
    ends = [i for i, token in enumerate(new) if token in serialiser.stop_ids]
    return serialiser.decode(new[: ends[0]] if ends else new)


def test_flagging_leaves_every_answer_as_plain_generate_gives_it(model, serialiser, monitor, clean):
    prompts = [*clean[:5], *alarmed(monitor)]
    found = Guard(model, serialiser, monitor, rate=2 * RATE).generate(
        prompts, max_new_tokens=TOKENS, batch_size=4
    )
    assert [d.text for d in found] == [plain(model, serialiser, p) for p in prompts]
    assert found[-1].alarm
    assert found[-1].alarm_at == 0
    assert found[-1].action == "flagged"


def test_live_p_values_are_those_of_captured_features(model, serialiser, monitor, clean):
    guard = Guard(model, serialiser, monitor, rate=2 * RATE)
    found = guard.generate(clean[:6], max_new_tokens=TOKENS)
    features = capture(model, serialiser, clean[:6], monitor.spec)
    np.testing.assert_allclose([d.prompt_p for d in found], monitor.p_values(features)["fused"], atol=1e-6)
    expected = monitor.tokens.p_values(features)
    for row, decision in enumerate(found):
        np.testing.assert_allclose(decision.p_values, expected[row][~np.isnan(expected[row])], atol=1e-6)


def test_a_token_monitor_keeps_its_rate_per_answer(model, serialiser, monitor, clean):
    fresh = [example.messages for example in language.generate(100, seed=5, heldout=False)]
    p = monitor.tokens.p_values(capture(model, serialiser, fresh, monitor.spec))
    assert (np.nanmin(p, axis=1) <= RATE).mean() == pytest.approx(RATE, abs=0.2)
    assert all((np.diff(row[~np.isnan(row)]) <= 0).all() for row in p)


def test_stopping_gives_out_no_token_of_an_alarmed_prompt(model, serialiser, prompt_monitor, clean):
    guard = Guard(model, serialiser, prompt_monitor, rate=0.05, action="stop")
    found = guard.generate([*alarmed(prompt_monitor), clean[0]], max_new_tokens=TOKENS)
    assert (found[0].text, found[0].action) == ("", "stopped")
    assert found[1].text == plain(model, serialiser, clean[0])


def test_answering_again_without_the_adapter_gives_the_base_models_answer(
    model, serialiser, prompt_monitor, clean
):
    guard = Guard(model, serialiser, prompt_monitor, rate=0.05, action="adapter_off")
    prompts = [*alarmed(prompt_monitor), clean[0]]
    found = guard.generate(prompts, max_new_tokens=TOKENS)
    with model.disable_adapter():
        base = plain(model, serialiser, prompts[0])
    assert (found[0].text, found[0].action) == (base, "answered without adapter")
    assert found[1].action == "answered"


def test_the_stream_is_the_answer_in_pieces(model, serialiser, prompt_monitor, clean):
    guard = Guard(model, serialiser, prompt_monitor, rate=0.05)
    steps = list(guard.stream([clean[1]], max_new_tokens=TOKENS))
    [whole] = guard.generate([clean[1]], max_new_tokens=TOKENS)
    assert len(steps) <= TOKENS
    assert "".join(step.token for step in steps) == whole.text
    assert all(step.p_value == whole.prompt_p and step.alarm == whole.alarm for step in steps)


def test_a_streamed_batch_gives_each_row_its_own_answer(model, serialiser, monitor, clean):
    guard = Guard(model, serialiser, monitor, rate=2 * RATE)
    steps = list(guard.stream(clean[:4], max_new_tokens=TOKENS))
    whole = guard.generate(clean[:4], max_new_tokens=TOKENS)
    for row, decision in enumerate(whole):
        own = [step for step in steps if step.row == row]
        assert "".join(step.token for step in own) == decision.text
        assert [step.p_value for step in own] == pytest.approx(decision.p_values[: len(own)])


def test_a_stream_whose_reader_leaves_ends_the_answer_and_unhooks_the_model(
    model, serialiser, prompt_monitor, clean, tmp_path
):
    log = tmp_path / "guard.jsonl"
    guard = Guard(model, serialiser, prompt_monitor, rate=0.05, log=log)
    stream = guard.stream(clean[:2], max_new_tokens=400)
    next(stream)
    stream.close()
    assert not any(module._forward_hooks for module in model.modules())
    assert len(log.read_text().splitlines()) == 2


def test_the_second_answer_is_streamed_as_a_whole(model, serialiser, prompt_monitor):
    prompts = alarmed(prompt_monitor)
    guard = Guard(model, serialiser, prompt_monitor, rate=0.05, action="adapter_off")
    steps = list(guard.stream(prompts, max_new_tokens=TOKENS))
    with model.disable_adapter():
        base = plain(model, serialiser, prompts[0])
    assert (steps[-1].token, steps[-1].alarm) == (base, True)
    assert all(step.token == "" for step in steps[:-1])


def test_decisions_of_finished_batches_outlive_a_failure(model, serialiser, prompt_monitor, clean, tmp_path):
    log = tmp_path / "guard.jsonl"
    guard = Guard(model, serialiser, prompt_monitor, rate=0.05, log=log)
    with pytest.raises(InputError, match="must end with a message of role user"):
        guard.generate([*clean[:2], []], max_new_tokens=2, batch_size=2)
    assert len(log.read_text().splitlines()) == 2


def test_a_prompt_costs_one_pass_a_divergence_one_more_and_one_that_differs_at_most_four_more(
    model, serialiser, monitor, prompt_monitor, clean, monkeypatch
):
    monkeypatch.setattr(views_of_passes, "SLIGHT", SLIGHT / 2)  # this adapter changes little
    apart = []
    for messages in clean:
        ids = torch.tensor([serialiser.encode(messages).input_ids])
        with torch.no_grad():
            on = model(ids).logits[0, -1].log_softmax(-1)
            with model.disable_adapter():
                off = model(ids).logits[0, -1].log_softmax(-1)
        apart.append(float(((on.exp() - off.exp()) * (on - off)).sum()))
    alike, differs = clean[int(np.argmin(apart))], clean[int(np.argmax(apart))]
    assert min(apart) < views_of_passes.SLIGHT < max(apart)
    passes = []
    inner = model.get_base_model().model.layers[0]
    handle = inner.register_forward_hook(lambda *_: passes.append(1))
    counts = []
    for watched, rate in ((prompt_monitor, 0.05), (monitor, 2 * RATE)):
        guard = Guard(model, serialiser, watched, rate=rate)
        for messages in (alike, differs):
            passes.clear()
            guard.generate([messages], max_new_tokens=1)
            counts.append(len(passes))
    handle.remove()
    # The prompt again, for its keys; its shorter versions side by side, adapter on; adapter off those that
    # move it; and off the others, where the score is not explained yet.
    assert counts[:3] == [1, 1, 2] and counts[3] in {4, 5, 6}


def test_prompts_are_cut_as_in_training(model, serialiser, prompt_monitor, clean):
    [long] = alarmed(prompt_monitor)
    guard = Guard(model, serialiser, prompt_monitor, rate=0.05, max_length=60)
    [decision] = guard.generate([long], max_new_tokens=1)
    features = capture(model, serialiser, [long], prompt_monitor.spec, max_length=60)
    assert decision.prompt_p == pytest.approx(prompt_monitor.p_values(features)["fused"][0])
    assert decision.lost == "last message"
    [whole] = Guard(model, serialiser, prompt_monitor, rate=0.05).generate([long], max_new_tokens=1)
    assert whole.lost == ""


def test_decisions_are_kept_as_json_lines_without_the_prompt(
    model, serialiser, prompt_monitor, clean, tmp_path
):
    log = tmp_path / "logs" / "guard.jsonl"
    guard = Guard(model, serialiser, prompt_monitor, rate=0.05, log=log)
    guard.generate(clean[:2], max_new_tokens=2)
    guard.generate(clean[2:3], max_new_tokens=2)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 3
    assert {"prompt_sha256", "prompt_p", "alarm", "alarm_at", "action", "rate", "text"} <= set(lines[0])
    assert clean[0][-1]["content"] not in log.read_text()


def test_a_saved_monitor_guards_as_before(model, serialiser, monitor, clean, tmp_path):
    monitor.save(tmp_path / "m.safetensors")
    found = [
        Guard(model, serialiser, m, rate=2 * RATE).generate(clean[:3], max_new_tokens=TOKENS)
        for m in (monitor, Monitor.load(tmp_path / "m.safetensors"))
    ]
    for a, b in zip(*found, strict=True):
        assert (a.text, a.alarm_at) == (b.text, b.alarm_at)
        np.testing.assert_allclose(a.p_values, b.p_values)


def test_what_cannot_be_guarded_is_refused(model, build, serialiser, monitor, prompt_monitor, clean):
    with pytest.raises(InputError, match=r"another model \(base, adapter differ"):
        Guard(build(seed=1), serialiser, prompt_monitor, rate=0.05)
    with pytest.raises(InputError, match="needs 499 clean calibration samples"):
        Guard(model, serialiser, prompt_monitor, rate=0.01)
    with pytest.raises(InputError, match="knows clean answers of 5 tokens at most"):
        Guard(model, serialiser, monitor, rate=2 * RATE).generate(clean[:1], max_new_tokens=6)
    with pytest.raises(InputError, match="num_beams is 2; one answer is watched"):
        Guard(model, serialiser, monitor, rate=2 * RATE).generate(clean[:1], max_new_tokens=2, num_beams=2)
    with pytest.raises(InputError, match="knows clean answers of 5 tokens at most"):
        list(Guard(model, serialiser, monitor, rate=2 * RATE).stream(clean[:1], max_new_tokens=6))
