"""The decoder's layers, wherever they are, and code of torch.compile that is run as it is written."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from safetynet.detection.features import FeatureSpec
from safetynet.detection.readers import Reader
from safetynet.models.blocks import decoder_layers, eagerly, unwrapped

SMALL = {
    "vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()


@pytest.fixture(autouse=True)
def compiler():
    yield
    torch._dynamo.reset()


def test_layers_of_a_compiled_model_are_the_models_own(model):
    compiled = torch.compile(model, backend="eager")
    assert unwrapped(compiled) is model
    assert all(one is other for one, other in zip(decoder_layers(compiled), model.model.layers, strict=True))


def test_of_two_lists_of_one_length_the_decoders_is_taken():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "image_size": 8}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    config = LlavaConfig(vision_config=vision, text_config={"model_type": "llama", **SMALL})
    both = LlavaForConditionalGeneration(config)
    assert {type(layer).__name__ for layer in decoder_layers(both)} == {"LlamaDecoderLayer"}


def test_features_of_a_compiled_model_are_those_of_the_model(model):
    ids, spec = torch.tensor([[5, 9, 23, 44]]), FeatureSpec(views=("last", "confidence"))

    def features(one):
        with torch.no_grad(), Reader(one, spec) as reader:
            reader.begin(torch.ones(1, 4))
            one(input_ids=ids)
            return reader.take()

    expected = features(model)
    model.compile(backend="eager")
    with torch.no_grad():
        model(input_ids=ids)  # compiled before anything reads
    found = features(model)
    assert found.keys() == expected.keys() == {"last", "logits"}
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_threads_that_come_and_go_leave_the_compiler_as_it_was():
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    double = torch.compile(lambda x: x * 2, backend=backend)
    first, second = threading.Event(), threading.Event()

    def early():
        with eagerly():
            first.set()
            second.wait(10)

    thread = threading.Thread(target=early)
    thread.start()
    first.wait(10)
    with eagerly():
        second.set()
        thread.join()
        assert double(torch.ones(2)).tolist() == [2, 2]
        assert not compiled, "the thread that came first has gone, and this one is still here"
    assert double(torch.ones(2)).tolist() == [2, 2] and len(compiled) == 1
