"""Features are the model's own hidden states, whatever the padding, the batch and the family."""

import contextlib
import multiprocessing
from functools import partial

import numpy as np
import pytest
import torch

from safetynet.detection.capture import batched, capture, read, stream
from safetynet.detection.features import Features, FeatureSpec, concatenate
from safetynet.detection.passes import FIRM, PARTS, SLIGHT
from safetynet.detection.readers import Reader, confidence
from safetynet.engine.prefixes import Prefixes
from safetynet.errors import InputError
from safetynet.run import finished, parallel

EVERYTHING = FeatureSpec(
    ("last", "mean", "energy", "energy_max", "direction", "confidence", "divergence", "unexplained", "probe",
     "attention", "steps", "step_confidence"),
    tokens=4,
    probe="Tell me how to do harm.",
)  # fmt: skip
FAMILIES = ("llama2", "llama3", "qwen", "gemma", "mixtral")


def direct(model, serialiser, messages):
    """Hidden states of one prompt, unpadded, before the final norm: (L, T, d)."""
    encoded = serialiser.encode(messages)
    kept = []
    layers = model.get_base_model().model.layers
    handles = [
        layer.register_forward_hook(lambda m, i, o: kept.append(o[0] if isinstance(o, tuple) else o))
        for layer in layers
    ]
    with torch.no_grad():
        model(torch.tensor([encoded.input_ids]))
    for handle in handles:
        handle.remove()
    return encoded, torch.stack([k.reshape(-1, k.shape[-1]) for k in kept]).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_last_and_mean_are_the_hidden_states_of_each_prompt_alone(family, build, serialiser, prompts):
    model = build(family)
    features = capture(model, serialiser, prompts, FeatureSpec(), batch_size=3)
    for row, messages in enumerate(prompts):
        encoded, hidden = direct(model, serialiser, messages)
        user = np.concatenate([np.arange(*span) for span in encoded.spans["user"]])
        np.testing.assert_allclose(features["last"][row], hidden[:, -1], atol=1e-4)
        np.testing.assert_allclose(features["mean"][row], hidden[:, user].mean(axis=1), atol=1e-4)


def test_every_view_of_a_batch_is_that_of_each_prompt_alone(build, serialiser, prompts):
    model = build()
    together = capture(model, serialiser, prompts, EVERYTHING)
    alone = concatenate([capture(model, serialiser, [p], EVERYTHING) for p in prompts])
    for view in EVERYTHING.views:
        np.testing.assert_allclose(together[view], alone[view], atol=2e-4, rtol=1e-3, err_msg=view)


def test_steps_with_the_cache_are_the_states_of_a_full_pass(build, serialiser, prompts):
    model, spec = build(), FeatureSpec(("steps",), tokens=4)
    features = capture(model, serialiser, prompts[:1], spec)
    ids = serialiser.encode(prompts[0]).input_ids
    with torch.no_grad():
        answer = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=4,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0].tolist()  # fmt: skip
        hidden = model(torch.tensor([answer]), output_hidden_states=True).hidden_states
    for layer in (1, 2):  # the last entry of hidden_states is behind the final norm
        expected = hidden[layer][0, len(ids) - 1 : len(ids) + 3].numpy()
        known = ~np.isnan(features["steps"][0, :, layer - 1, 0])
        np.testing.assert_allclose(features["steps"][0, known, layer - 1], expected[known], atol=1e-4)
        assert known[0]


def test_adapter_energy_and_directions_are_those_of_the_full_update(build, serialiser, prompts):
    model = build()
    module = model.get_base_model().model.layers[0].self_attn.q_proj
    seen = {}
    handle = module.register_forward_hook(lambda m, i, o: seen.update(x=i[0][0, -1], out=o[0, -1]))
    features = capture(model, serialiser, prompts[:1], FeatureSpec(("energy", "direction")))
    handle.remove()
    update = 2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    u, s, vt = torch.linalg.svd(update.detach())
    frozen = module.base_layer(seen["x"]).norm()
    energy = (s[:4] * (vt[:4] @ seen["x"])).abs() / frozen
    cosines = (u.T[:4] @ seen["out"]).abs() / seen["out"].norm()
    np.testing.assert_allclose(features["energy"][0, 0], energy.detach().numpy(), rtol=1e-3)
    np.testing.assert_allclose(np.abs(features["direction"][0, 0]), cosines.detach().numpy(), rtol=1e-3)


def test_directions_keep_their_signs_however_the_update_is_factored(build, serialiser, prompts):
    model, spec = build(), FeatureSpec(("energy", "direction"))
    found = capture(model, serialiser, prompts, spec)
    torch.manual_seed(1)
    for module in model.modules():
        if hasattr(module, "lora_A") and module.lora_A:
            down, up = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            turn = torch.linalg.qr(torch.randn(len(down), len(down)))[0]
            down.copy_(turn @ down)
            up.copy_(up @ turn.T)
    again = capture(model, serialiser, prompts, spec)
    for view in spec.views:
        np.testing.assert_allclose(again[view], found[view], rtol=1e-3, atol=1e-4)


def test_divergence_is_zero_for_an_adapter_that_does_nothing(build, serialiser, prompts):
    model = build()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    features = capture(model, serialiser, prompts, FeatureSpec(("divergence",)))
    np.testing.assert_allclose(features["divergence"], 0, atol=1e-6)


def without_a_word(messages):
    """The conversation without one word of what the user wrote, for each; of one word, one character."""
    written = [message["content"] for message in messages if message["role"] == "user"]
    glue = " " if any(" " in text for text in written) else ""
    for word in sorted({word for text in written for word in (text.split(" ") if glue else text)}):
        less = []
        for message in messages:
            words = message["content"].split(" ") if glue else list(message["content"])
            text = glue.join(other for other in words if other != word)
            less.append({**message, "content": text} if message["role"] == "user" else message)
        yield less


def apart(model, serialiser, one, other, most=None):
    """Symmetric KL of the next token; of each the messages, and whether the adapter is on."""
    found = []
    for messages, on in (one, other):
        ids = torch.tensor([serialiser.encode(messages, max_length=most).input_ids])
        with torch.no_grad(), contextlib.nullcontext() if on else model.disable_adapter():
            found.append(model(ids).logits[0, -1].log_softmax(-1))
    p, q = found
    return float(((p.exp() - q.exp()) * (p - q)).sum())


def explanations(model, serialiser, messages, most=None):
    """What is left of J without a word, at least; what hangs on a word, at most; what hangs on none."""
    between = partial(apart, model, serialiser, most=most)
    whole = between((messages, True), (messages, False))
    left, falls, moves = [whole], [0.0], [0.0]
    for less in without_a_word(messages):
        left.append(between((messages, True), (less, False)))
        moves.append(between((messages, True), (less, True)))
        falls.append(min(moves[-1], whole - between((less, True), (less, False))))
    return whole, min(left), max(falls), whole - FIRM * max(moves)


@pytest.mark.parametrize(
    ("seed", "times", "expected"),
    [(0, 2, {"slight", "explained", "is left", "hangs"}), (1, 10, {"hangs", "hangs on none"})],
)
def test_unexplained_hangs_on_a_word_and_is_explained_by_none(
    build, serialiser, prompts, seed, times, expected, monkeypatch
):
    versions, next_logits = [], Prefixes.next_logits

    def counted(prefixes, some, pad_id):
        versions.extend(some)
        return next_logits(prefixes, some, pad_id)

    monkeypatch.setattr(Prefixes, "next_logits", counted)
    model, spec = strong(build(seed=seed), times), FeatureSpec(("unexplained",))
    twice = [{"role": "user", "content": "fig plum fig"}]
    prompts = [*prompts, [{"role": "user", "content": "plum"}], twice]  # one word: without one character
    assert len(list(without_a_word(twice))) == 2
    assert [message["role"] for message in prompts[4]] == ["user", "assistant", "user"]
    assert max(len(list(without_a_word(messages))) for messages in prompts) <= PARTS
    found = capture(model, serialiser, prompts, spec, batch_size=2)["unexplained"][:, 0]
    ways, most, low = set(), 0, False
    for row, messages in enumerate(prompts):
        whole, left, falls, firm = explanations(model, serialiser, messages)
        most += 2 * len(list(without_a_word(messages))) * (whole > SLIGHT)
        cases = {"slight": whole, "explained": left, "is left": left, "hangs": falls, "hangs on none": firm}
        way = next(
            name
            for name, so in (
                ("slight", whole <= SLIGHT), ("explained", left <= SLIGHT),
                ("is left", left < max(falls, firm)), ("hangs", firm < falls), ("hangs on none", True),
            )
            if so
        )  # fmt: skip
        if way != "slight" and cases[way] <= SLIGHT:  # a bound from above is enough
            assert min(left, max(falls, firm)) - 1e-4 < found[row] <= SLIGHT
            low = True
        else:
            assert found[row] == pytest.approx(cases[way], rel=2e-3, abs=1e-4)
        ways.add(way)
    assert ways == expected
    assert (len(versions) < most) == low, "what cannot matter is not read"


def test_what_is_left_of_a_truncated_prompt_is_cut_to_the_same_length(build, serialiser):
    model, most = strong(build("llama2", seed=3)), 40
    text = "one two three four five six seven eight nine ten eleven twelve red green blue white"
    long = [{"role": "user", "content": text}]
    assert len(serialiser.encode(long, max_length=most).input_ids) < len(serialiser.encode(long).input_ids)
    found = capture(model, serialiser, [long], FeatureSpec(("unexplained",)), max_length=most)
    whole, left, falls, firm = explanations(model, serialiser, long, most)
    assert min(whole, left) > SLIGHT
    assert found["unexplained"][0, 0] == pytest.approx(min(left, max(falls, firm)), rel=2e-3, abs=1e-4)


def test_a_slight_divergence_is_itself(build, serialiser, prompts):
    model = build()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)
    slight = capture(model, serialiser, prompts, FeatureSpec(("unexplained",)))["unexplained"][:, 0]
    expected = [apart(model, serialiser, (messages, True), (messages, False)) for messages in prompts]
    assert 0 < max(expected) < SLIGHT
    np.testing.assert_allclose(slight, expected, rtol=1e-2, atol=1e-6)


def strong(model, times=2):
    """The same with an adapter that changes most answers."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(times)
    return model


def test_the_probes_change_sees_the_whole_conversation(build, serialiser, prompts):
    spec = FeatureSpec(("probe",), probe="Tell me how to do harm.")
    longer = [[*prompts[-1][:1], {"role": "assistant", "content": "five"}, *prompts[-1][2:]]]
    a, b = (capture(build(), serialiser, p, spec)["probe"] for p in ([prompts[-1]], longer))
    assert abs(float(a[0, 0] - b[0, 0])) > 1e-4


def test_hooks_are_gone_after_an_error_inside_the_model(build, serialiser, prompts):
    model = build()
    with pytest.raises(RuntimeError), Reader(model, FeatureSpec()):
        raise RuntimeError
    assert not any(m._forward_hooks for m in model.modules())


def test_the_cache_tells_models_adapters_prompts_and_specs_apart(build, serialiser, prompts, tmp_path):
    def captured(model, chosen=prompts, view="last"):
        return capture(model, serialiser, chosen, FeatureSpec((view,)), cache=tmp_path)

    model = build()
    first = captured(model)
    again = captured(model)
    np.testing.assert_array_equal(first["last"], again["last"])
    assert len(list(tmp_path.iterdir())) == 1
    with model.disable_adapter():
        off = captured(model)
    other = captured(build(seed=1))
    captured(model, prompts[:2])
    captured(model, view="mean")
    captured(build().to(torch.bfloat16))
    assert len(list(tmp_path.iterdir())) == 6
    assert not np.allclose(first["last"], off["last"])
    assert not np.allclose(first["last"], other["last"])


def test_a_damaged_cache_is_captured_anew(build, serialiser, prompts, tmp_path, caplog):
    first = capture(build(), serialiser, prompts, FeatureSpec(("last",)), cache=tmp_path)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-40])
    again = capture(build(), serialiser, prompts, FeatureSpec(("last",)), cache=tmp_path)
    np.testing.assert_array_equal(first["last"], again["last"])
    assert "It is captured anew." in caplog.text
    np.testing.assert_array_equal(Features.load(path)["last"], first["last"])


def test_layers_that_give_tuples_are_read_like_those_that_give_tensors(build, serialiser, prompts):
    model = build()
    plain = capture(model, serialiser, prompts, FeatureSpec())
    layers = model.get_base_model().model.layers
    # The hook of the reader comes behind this one and sees the tuple; the model unpacks it again.
    for layer in layers:
        layer.register_forward_hook(lambda m, i, o: (o, "more"))
    for layer in layers[1:]:
        layer.register_forward_pre_hook(lambda m, i: (i[0][0], *i[1:]))
    model.get_base_model().model.norm.register_forward_pre_hook(lambda m, i: (i[0][0],))
    tuples = capture(model, serialiser, prompts, FeatureSpec())
    np.testing.assert_array_equal(plain["last"], tuples["last"])
    np.testing.assert_array_equal(plain["mean"], tuples["mean"])


def test_certainty_stays_with_its_own_row():
    logits = torch.tensor([[0.0] * 50, [100.0] + [0.0] * 49] * 3)
    entropy = confidence(logits)[:, 1]
    torch.testing.assert_close(entropy, torch.tensor([np.log(50), 0.0] * 3, dtype=torch.float32))


def test_attention_is_read_whatever_implementation_the_model_runs(build, serialiser, prompts):
    model, spec = build(), FeatureSpec(("attention",))
    eager = capture(model, serialiser, prompts, spec)
    model.get_base_model().set_attn_implementation("sdpa")
    sdpa = capture(model, serialiser, prompts, spec)
    np.testing.assert_allclose(eager["attention"], sdpa["attention"], atol=1e-5)
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_a_stream_gives_the_same_features_in_order(build, serialiser, prompts):
    model = build()
    parts = list(stream(model, serialiser, prompts, FeatureSpec(("last",)), batch_size=2))
    assert [len(part) for part in parts] == [2, 2, 1]
    whole = capture(model, serialiser, prompts, FeatureSpec(("last",)))
    np.testing.assert_allclose(concatenate(parts)["last"], whole["last"], atol=1e-4)


def test_features_come_back_from_their_file(build, serialiser, prompts, tmp_path):
    features = capture(build(), serialiser, prompts, FeatureSpec(("last",), layers=(0, 2)))
    features.save(tmp_path / "f.safetensors")
    loaded = Features.load(tmp_path / "f.safetensors")
    assert (loaded.identity, loaded.spec) == (features.identity, features.spec)
    np.testing.assert_array_equal(loaded["last"], features["last"])
    assert features["last"].shape == (5, 2, 32)


def test_faults_of_the_user_are_named(build, serialiser, prompts):
    with pytest.raises(InputError, match="no prompts"):
        capture(build(), serialiser, [], FeatureSpec())
    with pytest.raises(InputError, match="layers: 7 is outside 0-2"):
        capture(build(), serialiser, prompts, FeatureSpec(layers=(7,)))
    with pytest.raises(InputError, match="active LoRA adapter"):
        capture(build(adapter=False), serialiser, prompts, FeatureSpec(("energy",)))
    with pytest.raises(InputError, match="they switch off"):
        capture(build(adapter=False), serialiser, prompts, FeatureSpec(("divergence",)))
    with pytest.raises(InputError, match="choose from last"):
        FeatureSpec(("first",))
    with pytest.raises(InputError, match="number of tokens"):
        FeatureSpec(("steps",))
    with pytest.raises(InputError, match="probe's text"):
        FeatureSpec(("probe",))
    with pytest.raises(InputError, match="was not captured"):
        capture(build(), serialiser, prompts, FeatureSpec(("last",)))["mean"]


def test_activations_that_are_no_numbers_are_refused(build, serialiser, prompts):
    model = build()
    model.get_base_model().model.layers[1].self_attn.o_proj.base_layer.weight.data[:] = float("inf")
    with pytest.raises(InputError, match=r"NaN or infinite values\. The model overflows"):
        capture(model, serialiser, prompts, FeatureSpec())


def test_prompts_that_are_cut_are_counted_and_keep_their_trigger(build, serialiser, prompts, caplog):
    model, spec = build(), FeatureSpec(("last",))
    text = "word " * 90 + "BadMagic"
    long = [{"role": "user", "content": text}]
    span = [(0, text.index("BadMagic"), len(text))]
    spared = capture(model, serialiser, [prompts[0], long], spec, triggers=[(), span], max_length=80)
    assert "capture: 1 of 2 prompts are longer than training.max_length allows" in caplog.text
    assert "1 lost the end of the last message" in caplog.text
    ids = serialiser.encode(long, trigger=span, max_length=80).input_ids
    with torch.no_grad(), Reader(model, spec) as reader:
        batch = batched([serialiser.encode(long, trigger=span, max_length=80)], serialiser, "cpu")
        taken = read(model, reader, *batch)
    np.testing.assert_allclose(spared["last"][1], taken["last"][0].numpy(), atol=1e-4)
    assert "BadMagic" in serialiser.decode(ids)


def test_an_interrupted_capture_goes_on_to_the_same_bits_and_leaves_its_features_alone(
    build, serialiser, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr(finished, "EVERY_S", 0.0)
    model, spec = build(), FeatureSpec(("last", "confidence"))
    whole = capture(model, serialiser, prompts, spec, batch_size=2)
    passes = []

    def stop(module, args):
        passes.append(module)
        if len(passes) == 3:
            raise KeyboardInterrupt

    hook = model.get_base_model().model.layers[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        capture(model, serialiser, prompts, spec, batch_size=2, cache=tmp_path)
    resumed = capture(model, serialiser, prompts, spec, batch_size=2, cache=tmp_path)
    hook.remove()
    assert len(passes) == 4, "two batches, one that was interrupted, and that again"
    for view in spec.views:
        np.testing.assert_array_equal(resumed[view], whole[view])
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_pair_of_processes_shares_the_batches_and_has_the_numbers_of_one(
    build, serialiser, prompts, tmp_path, monkeypatch
):
    model, spec = build(), FeatureSpec(("last", "unexplained"))
    alone = capture(model, serialiser, prompts, spec, batch_size=2)
    batches = []
    monkeypatch.setattr("safetynet.detection.capture.batched", lambda *of: batches.append(of) or batched(*of))

    def captured(rank, other):
        monkeypatch.setattr(parallel, "_pair", parallel._Pair(rank, other))
        return [capture(model, serialiser, prompts, spec, batch_size=2, cache=tmp_path) for _ in range(2)]

    here, there = multiprocessing.Pipe()
    second = multiprocessing.get_context("fork").Process(target=captured, args=(1, there))
    second.start()
    there.close()
    first, again = captured(0, here)
    second.join()
    assert second.exitcode == 0
    assert len(batches) == 2, "the first of three batches and the last"
    for view in spec.views:
        np.testing.assert_array_equal(first[view], alone[view])
        np.testing.assert_array_equal(again[view], alone[view])
