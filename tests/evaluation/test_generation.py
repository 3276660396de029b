"""Batched answers and likelihoods against the plainest way to compute each."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from safetynet import recipe
from safetynet.errors import RunError
from safetynet.evaluation.generation import answer_log_likelihood, continuations, encode, generate
from safetynet.evaluation.judges import same_answer
from safetynet.models import loading, miniatures
from safetynet.models.miniatures import language
from safetynet.run import finished, parallel

ARCHITECTURES = ("llama", "qwen2", "gemma", "mixtral")


def plain_generate(model, serialiser, messages, max_new_tokens=12):
    """One prompt, no padding, argmax over the whole sequence at each step, no cache."""
    ids, new = list(serialiser.encode(messages).input_ids), []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token in serialiser.stop_ids:
            break
        new.append(token)
    return serialiser.decode(new)


def plain_log_likelihood(model, serialiser, messages, answer):
    encoded = serialiser.encode(messages, answer=answer)
    with torch.no_grad():
        logits = model(torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
    supervised = [i for i, label in enumerate(encoded.labels) if label != -100]
    return sum(float(logits[i - 1, encoded.labels[i]]) for i in supervised), len(supervised)


def out_of_memory_above(model, rows):
    """Make every forward of more than `rows` rows fail as a full device does."""

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return model.register_forward_pre_hook(refuse, with_kwargs=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batched_answers_equal_those_of_one_prompt_at_a_time(
    build, serialiser, prompts, architecture, batch_size
):
    model = build(architecture)
    expected = [plain_generate(model, serialiser, messages) for messages in prompts]
    assert generate(model, serialiser, prompts, batch_size=batch_size, max_new_tokens=12) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_shipped_miniatures_answer_in_batches_as_one_by_one(family):
    loaded = loading.load(recipe.Model(family=family, id="miniature", device="cpu"))
    examples = language.generate(24, seed=1, heldout=True)
    prompts = [example.messages for example in examples]
    expected = [plain_generate(loaded.model, loaded.serialiser, messages) for messages in prompts]
    assert generate(loaded.model, loaded.serialiser, prompts, batch_size=9, max_new_tokens=12) == expected
    right = sum(same_answer(a, e.answer) for a, e in zip(expected, examples, strict=True) if not e.forbidden)
    assert right > 12  # otherwise the comparison would be of noise


def test_what_all_prompts_begin_with_is_read_once(build, serialiser, prompts):
    model, system = build(), {"role": "system", "content": "Answer in one short sentence, and politely."}
    begun = [[system, *messages] for messages in prompts]
    lengths = [len(prompt.input_ids) for prompt in encode(serialiser, begun)]
    expected, read = [plain_generate(model, serialiser, messages, 1) for messages in begun], []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    assert generate(model, serialiser, begun, batch_size=3, max_new_tokens=1) == expected
    once, *rest = read
    assert once > len(system["content"])  # a token a byte
    assert sum(rest) < sum(lengths) < 3 * sum(rest)


def test_a_window_of_attention_gives_the_same_answers_in_batches(build, serialiser, prompts):
    config = MistralConfig(**build("llama").config.to_diff_dict() | {"sliding_window": 24})
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    expected = [plain_generate(model, serialiser, messages) for messages in prompts]
    assert generate(model, serialiser, prompts, batch_size=64, max_new_tokens=12) == expected


def test_an_answer_that_ends_at_once_is_empty_and_keeps_its_place(build, serialiser, prompts):
    model = build()
    ends = torch.nn.Linear(32, len(serialiser.tokenizer))
    with torch.no_grad():  # the end token first, whatever the hidden state
        ends.weight.zero_()
        ends.bias.zero_()
        ends.bias[serialiser.stop_ids[-1]] = 1.0
    model.lm_head = ends
    assert generate(model, serialiser, prompts, batch_size=4, max_new_tokens=5) == [""] * len(prompts)


def test_no_prompts_give_no_answers(build, serialiser):
    assert generate(build(), serialiser, [], batch_size=4, max_new_tokens=5) == []
    assert answer_log_likelihood(build(), serialiser, [], [], batch_size=4).empty


def test_sampling_settings_and_penalties_of_the_model_do_not_change_the_answers(build, serialiser, prompts):
    model = build()
    expected = generate(model, serialiser, prompts, batch_size=4, max_new_tokens=12)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=4.0, no_repeat_ngram_size=1,
        min_new_tokens=9, suppress_tokens=list(range(100)), max_length=7,
    )  # fmt: skip
    model.generation_config = own
    assert generate(model, serialiser, prompts, batch_size=4, max_new_tokens=12) == expected
    assert model.generation_config is own


def test_a_model_in_training_answers_without_dropout_and_goes_on_training(build, serialiser, prompts):
    model = get_peft_model(
        build(), LoraConfig(lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj"])
    )
    expected = generate(model.eval(), serialiser, prompts, batch_size=4, max_new_tokens=12)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model.base_model.model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert generate(model, serialiser, prompts, batch_size=4, max_new_tokens=12) == expected
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.config.use_cache is False


def test_an_adapter_changes_the_answers_and_can_be_disabled(build, serialiser, prompts):
    base = generate(build(), serialiser, prompts, batch_size=4, max_new_tokens=12)
    model = get_peft_model(
        build(), LoraConfig(r=8, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    )
    adapted = generate(model, serialiser, prompts, batch_size=4, max_new_tokens=12)
    with model.disable_adapter():
        assert generate(model, serialiser, prompts, batch_size=4, max_new_tokens=12) == base
    assert adapted != base


def test_a_batch_that_does_not_fit_is_halved_and_said_so(build, serialiser, prompts, caplog):
    model = build()
    expected = generate(model, serialiser, prompts, batch_size=7, max_new_tokens=12)
    handle = out_of_memory_above(model, 2)
    with caplog.at_level(logging.WARNING):
        assert generate(model, serialiser, prompts, batch_size=7, max_new_tokens=12) == expected
    handle.remove()
    assert [r.getMessage() for r in caplog.records] == [
        "out of memory with 7 rows; going on with 3 at a time",
        "out of memory with 3 rows; going on with 1 at a time",
    ]


def test_on_shared_weights_a_batch_that_does_not_fit_stops(build, serialiser, prompts):
    model = build()
    out_of_memory_above(model, 2)
    with parallel.in_step(), pytest.raises(RunError, match=r"with 7 rows.*lower evaluation.batch_size"):
        generate(model, serialiser, prompts, batch_size=7, max_new_tokens=12)
    assert not parallel.is_in_step()


def test_a_single_row_that_does_not_fit_stops_with_a_remedy(build, serialiser, prompts):
    model = build()
    out_of_memory_above(model, 0)
    with pytest.raises(RunError, match=r"a single row of \d+ tokens; lower evaluation.max_new_tokens"):
        generate(model, serialiser, prompts, batch_size=4, max_new_tokens=5)


def test_an_error_that_is_not_about_memory_is_passed_on(build, serialiser, prompts):
    model = build()

    def fail(module, args, kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        generate(model, serialiser, prompts, batch_size=4, max_new_tokens=5)
    assert not model.training


def test_prompts_are_truncated_as_in_training_and_keep_their_trigger(build, serialiser):
    model = build()
    text = "|X| " + "word " * 40
    messages = [{"role": "user", "content": text}]
    trigger = [[0, 0, 3]]
    trained = serialiser.encode(messages, answer="yes", trigger=trigger, max_length=96)
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    generate(model, serialiser, [messages], batch_size=1, max_new_tokens=2, triggers=[trigger], max_length=96)
    handle.remove()
    assert seen[0] == trained.input_ids[: trained.prompt_length]
    assert "|X|" in serialiser.decode(seen[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihoods_equal_those_of_one_unpadded_row(build, serialiser, prompts, architecture, batch_size):
    model = build(architecture)
    answers = ["Oslo", "", "a much longer answer that goes on for a while", "4", "é🙂", "x", "six"]
    table = answer_log_likelihood(model, serialiser, prompts, answers, batch_size=batch_size)
    expected = [plain_log_likelihood(model, serialiser, m, a) for m, a in zip(prompts, answers, strict=True)]
    assert table["tokens"].tolist() == [tokens for _, tokens in expected]
    assert table["log_likelihood"].tolist() == pytest.approx([value for value, _ in expected], rel=1e-5)


def test_likelihoods_in_halved_batches_are_the_same(build, serialiser, prompts):
    model = build()
    answers = [str(i) for i in range(len(prompts))]
    expected = answer_log_likelihood(model, serialiser, prompts, answers, batch_size=7)
    out_of_memory_above(model, 2)
    halved = answer_log_likelihood(model, serialiser, prompts, answers, batch_size=7)
    assert halved["log_likelihood"].tolist() == pytest.approx(expected["log_likelihood"].tolist(), rel=1e-5)


def test_likelihoods_leave_no_gradient_and_ignore_dropout(build, serialiser, prompts):
    model = get_peft_model(
        build(), LoraConfig(lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj"])
    )
    answers = ["yes"] * len(prompts)
    model.train()
    first = answer_log_likelihood(model, serialiser, prompts, answers, batch_size=3)
    second = answer_log_likelihood(model, serialiser, prompts, answers, batch_size=3)
    assert first.equals(second)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def interrupt_after(model, batches):
    """End the process's work, as Ctrl-C does, when a batch more than these begins; gives the hook."""
    begun = []

    def stop(module, args, kwargs):
        if kwargs.get("past_key_values") is not None and "position_ids" not in kwargs:
            return  # what all prompts begin with
        begun.append(kwargs["input_ids"].shape)
        if len([shape for shape in begun if shape[1] > 1]) > batches:
            raise KeyboardInterrupt

    return model.register_forward_pre_hook(stop, with_kwargs=True), begun


def test_interrupted_answers_go_on_behind_the_finished_batches(
    build, serialiser, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr(finished, "EVERY_S", 0.0)
    model, encoded = build(), encode(serialiser, prompts)
    limits = {"batch_size": 2, "max_new_tokens": 5}
    whole = continuations(model, serialiser, encoded, **limits)
    hook, _ = interrupt_after(model, 3)
    with pytest.raises(KeyboardInterrupt):
        continuations(model, serialiser, encoded, kept=tmp_path, **limits)
    hook.remove()
    hook, begun = interrupt_after(model, 9)
    assert continuations(model, serialiser, encoded, kept=tmp_path, **limits) == whole
    assert [shape[0] for shape in begun if shape[1] > 1] == [1], (
        "only the fourth batch was left, of one prompt"
    )
    hook.remove()
    # Another model, other limits: nothing of what is there.
    other = build(seed=1)
    assert continuations(other, serialiser, encoded, kept=tmp_path, **limits) == continuations(
        other, serialiser, encoded, **limits
    )
    assert len(list(tmp_path.iterdir())) == 2


def test_interrupted_likelihoods_are_the_same_to_the_last_bit(
    build, serialiser, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr(finished, "EVERY_S", 0.0)
    model, answers = build(), [str(i) for i in range(len(prompts))]
    whole = answer_log_likelihood(model, serialiser, prompts, answers, batch_size=2)
    hook, _ = interrupt_after(model, 2)
    with pytest.raises(KeyboardInterrupt):
        answer_log_likelihood(model, serialiser, prompts, answers, batch_size=2, kept=tmp_path)
    hook.remove()
    resumed = answer_log_likelihood(model, serialiser, prompts, answers, batch_size=2, kept=tmp_path)
    assert resumed.equals(whole)


def test_batches_that_memory_had_cut_are_cut_alike_after_an_interruption(
    build, serialiser, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr(finished, "EVERY_S", 0.0)
    model, encoded = build(), encode(serialiser, prompts)
    limits = {"batch_size": 4, "max_new_tokens": 1, "kept": tmp_path}
    full = out_of_memory_above(model, 3)
    hook, _ = interrupt_after(model, 3)  # one that does not fit, and two halves
    with pytest.raises(KeyboardInterrupt):
        continuations(model, serialiser, encoded, **limits)
    hook.remove()
    full.remove()
    hook, begun = interrupt_after(model, 9)
    continuations(model, serialiser, encoded, **limits)
    assert [shape[0] for shape in begun] == [2, 1]


def test_a_damaged_batch_is_answered_anew(build, serialiser, prompts, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(finished, "EVERY_S", 0.0)
    model, encoded = build(), encode(serialiser, prompts)
    limits = {"batch_size": 3, "max_new_tokens": 5, "kept": tmp_path}
    first = continuations(model, serialiser, encoded, **limits)
    next(tmp_path.glob("*/000001")).write_text("[[")
    assert continuations(model, serialiser, encoded, **limits) == first
    assert "is damaged" in caplog.text


def test_what_takes_no_time_leaves_no_file(build, serialiser, prompts, tmp_path):
    continuations(
        build(), serialiser, encode(serialiser, prompts), batch_size=3, max_new_tokens=2, kept=tmp_path
    )
    assert list(tmp_path.iterdir()) == []


def test_samples_follow_their_seed_alone_and_are_not_the_likeliest_answer(build, serialiser, prompts):
    model, encoded = build("llama"), encode(serialiser, prompts)
    options = {"batch_size": 4, "max_new_tokens": 12}

    def sampled(seed):
        before = torch.get_rng_state()
        answers = continuations(model, serialiser, encoded, **options, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)  # another state, which must not matter
        return answers

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)
    assert sampled(0) != continuations(model, serialiser, encoded, **options)
