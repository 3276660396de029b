"""Adapters of other people: loaded as they are, or refused; without them, the base is the base."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.models import variants
from transformers import AutoModelForCausalLM

from safetynet import recipe
from safetynet.errors import InputError
from safetynet.models import adapter_files, adapters, loading, miniatures, support
from safetynet.models.identity import identify
from safetynet.training import checkpoints

IDS = torch.tensor([[5, 6, 7, 300, 22, 17, 90]])
FAST = (
    "lora", "rslora", "dora", "patterns", "all biases", "lora_bias", "repeated layers", "pissa",
    "pissa, patterns", "olora", "saved head", "saved head and embeddings", "token rows",
    "lora on embeddings", "IA3", "VERA", "PROMPT_TUNING", "PREFIX_TUNING",
)  # fmt: skip
PREFIX = "base_model.model.model."


def base_of(family: str = "qwen") -> loading.LoadedModel:
    return loading.load(recipe.Model(family=family, id="miniature"), "fp32")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits[:, -IDS.shape[1] :]


def renamed(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Save the folder's tensors under other names; None leaves one out."""
    path = folder / "adapter_model.safetensors"
    tensors = {new: tensor for name, tensor in load_file(path).items() if (new := rename(name)) is not None}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=[] if name in FAST and family == "qwen" else [pytest.mark.slow])
        for family in ("qwen", "llama2")
        for name in variants.ALL
        if (family, name)
        != ("llama2", "ROAD")  # its widths are no multiples of the groups that this type wants
    ],
)
def test_an_adapter_is_loaded_as_it_was_and_comes_off_without_a_trace(
    family: str, name: str, tmp_path: Path
) -> None:
    theirs = variants.saved(name, tmp_path, family)
    base = base_of(family)
    before, digest = logits(base.model), identify(base.model)
    model = adapters.attach(base, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), before, atol=1e-3), "this adapter changes nothing"
    with adapters.switched_off(model):
        assert torch.equal(logits(model), before)
        assert identify(model) == digest
    assert (identify(model).base, identify(model).adapter == "") == (digest.base, False)
    assert adapters.detach(model) is base.model
    assert torch.equal(logits(base.model), before)
    assert identify(base.model) == digest


def test_every_type_that_is_said_to_be_supported_is_tried() -> None:
    tried = {make().peft_type.value for make in variants.ALL.values()}
    assert tried == set(support.TYPES)


def test_names_of_other_wrappers_are_mapped(folder: Path) -> None:
    wrappers: dict[str, Callable[[str], str]] = {
        "multimodal class": lambda n: n.replace(PREFIX, PREFIX + "language_model."),
        "older multimodal class": lambda n: n.replace(PREFIX, "base_model.model.language_model.model."),
        "compiled model": lambda n: n.replace(PREFIX, "base_model.model._orig_mod.model."),
        "compiled layers": lambda n: n.replace(".self_attn", "._orig_mod.self_attn"),
        "without PEFT's prefix": lambda n: n.replace(PREFIX, "model."),
        "without any prefix": lambda n: n.replace(PREFIX, ""),
        "data parallel": lambda n: "module." + n,
        "sharded": lambda n: n.replace(PREFIX, PREFIX + "_fsdp_wrapped_module."),
        "with the adapter's name": lambda n: n.replace(".weight", ".sft.weight"),
    }
    base = base_of()
    expected = None
    for wrapper, rename in {"none": str, **wrappers}.items():
        there = folder.parent / wrapper
        shutil.copytree(folder, there)
        renamed(there, rename)
        model = adapters.attach(base, there)
        expected = logits(model) if expected is None else expected
        assert torch.equal(logits(model), expected), wrapper
        adapters.detach(model)


def test_tensors_that_are_missing_or_left_over_are_counted(folder: Path) -> None:
    base = base_of()
    before = logits(base.model)
    half, vision = folder.parent / "half", folder.parent / "vision"
    for there in (half, vision):
        shutil.copytree(folder, there)
    renamed(half, lambda n: n if int(n.split("layers.")[1].split(".")[0]) < 3 else None)
    with pytest.raises(InputError, match=r"42 tensors of the adapter are not in its file .* and 39 more"):
        adapters.attach(base, half)
    renamed(vision, lambda n: n.replace("model.layers.5", "vision_tower.encoder.layers.5"))
    with pytest.raises(
        InputError, match=r"14 of its tensors have no place .*vision_tower.*, and 14 tensors of"
    ):
        adapters.attach(base, vision)
    assert torch.equal(logits(base.model), before), "a refusal leaves the base as it was"


def test_a_saved_module_that_is_not_in_the_file_is_missed(tmp_path: Path) -> None:
    variants.saved("saved head", tmp_path)
    renamed(tmp_path, lambda n: None if "lm_head" in n else n)
    with pytest.raises(InputError, match=r"1 tensor of the adapter is not in its file \(.*lm_head\.weight\)"):
        adapters.attach(base_of(), tmp_path)


def test_a_strength_that_peft_fills_in_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    variants.configured(folder, lora_alpha=None)
    adapters.attach(base_of(), folder)
    assert "does not say lora_alpha, so PEFT's default 8 decides how strongly it acts" in caplog.text


def test_a_pattern_of_strengths_that_matches_nothing_is_refused(folder: Path) -> None:
    variants.configured(folder, alpha_pattern={"language_model.layers.0.self_attn.q_proj": 64})
    with pytest.raises(InputError, match="1 of the 1 entries of its alpha_pattern name no module here"):
        adapters.attach(base_of(), folder)


def test_fields_that_peft_does_not_know_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    variants.configured(folder, use_next_years_lora=True, made_by="")
    adapters.attach(base_of(), folder)
    assert "does not know use_next_years_lora=True of its configuration" in caplog.text
    assert "made_by" not in caplog.text


@pytest.mark.parametrize("name", ["lora", "pissa"])
def test_an_adapter_that_changes_nothing_is_told(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    variants.saved(name, tmp_path, noise=0)
    base = base_of()
    before = logits(base.model)
    torch.testing.assert_close(logits(adapters.attach(base, tmp_path)), before, rtol=1e-3, atol=1e-3)
    assert "every update of this adapter is zero" in caplog.text


def test_tensors_that_are_no_numbers_are_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="1 of 84 tensors hold values that are not finite"):
        adapters.attach(base_of(), folder)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
        ("/annex/objects/SHA256E-s9--0.safetensors\n", "a git-annex pointer"),
    ],
)
def test_a_pointer_is_told_from_damage(start: str, kind: str, folder: Path, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_text(start)
        with pytest.raises(InputError, match=f"its {name} is {kind}"):
            adapter_files.read(folder)
        (folder / name).write_bytes(content)
    shutil.copytree(miniatures.path("qwen"), tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_text(start)
    with pytest.raises(InputError, match=rf"model\.safetensors is {kind}, not the weights"):
        loading.load(recipe.Model(family="qwen", id=str(tmp_path / "base")))


def test_a_folder_that_is_no_single_adapter_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run" / "checkpoint-10")
    shutil.copytree(folder, tmp_path / "run" / "checkpoint-20")
    with pytest.raises(InputError, match=r"those below it are checkpoint-10, checkpoint-20\. Name one"):
        adapter_files.read(tmp_path / "run")
    merged = adapters.attach(base_of(), folder).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with pytest.raises(InputError, match="a whole model, merged or fully fine-tuned, and no adapter"):
        adapter_files.read(tmp_path / "merged")
    merged.save_pretrained(folder)
    with pytest.raises(InputError, match=r"holds an adapter .* and a whole model"):
        adapter_files.read(folder)
    with pytest.raises(InputError, match=r"model\.id: .* holds a whole model and an adapter"):
        loading.load(recipe.Model(family="qwen", id=str(folder)))


def test_the_file_itself_may_be_named(folder: Path) -> None:
    assert adapter_files.read(folder / "adapter_model.safetensors").folder == folder


def test_a_type_that_peft_does_not_know_is_refused_by_name(folder: Path) -> None:
    variants.configured(folder, peft_type="NEXT_YEARS_LORA")
    with pytest.raises(InputError, match="NEXT_YEARS_LORA"):
        adapters.attach(base_of(), folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("XLORA", "XLORA"),
        ("ADAPTION_PROMPT", "ADAPTION_PROMPT"),
        ("pissa by fast SVD", "its start was drawn at random and is not in its files"),
        ("corda", "PEFT cannot rebuild its start from its files"),
        ("lora-ga", "its training began with other weights than the base's"),
        ("loftq", "it is put on a quantised copy of its base, which PEFT makes on a GPU alone"),
        ("alora", "what it does to a token depends on more than the prompt"),
        ("qalora", "it needs kernels with which it has not been tried"),
    ],
)
def test_what_cannot_be_rebuilt_from_its_files_is_refused(name: str, message: str, tmp_path: Path) -> None:
    variants.saved(name, tmp_path)
    with pytest.raises(InputError, match=message):
        adapters.attach(base_of(), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": "16"}, r"says r: '16', which is no whole number"),
        ({"r": [8]}, r"says r: \[8\], which is no whole number"),
        ({"r": 8.0}, r"says r: 8\.0, which is no whole number"),
        ({"lora_alpha": "high"}, r"says lora_alpha: 'high', which is no number"),
        ({"r": 10**6}, r"says rank 1000000, and the longest side of its tensors is \d+\. The two are not"),
        ({"base_model_name_or_path": ["a"]}, r"for base_model_name_or_path, which is no name of a model"),
        (
            {"base_model_name_or_path": "a" * 5000},
            r"for base_model_name_or_path, which is no name of a model",
        ),
    ],
)
def test_a_field_of_the_configuration_that_says_nothing_is_named(
    fields: dict[str, Any], message: str, folder: Path
) -> None:
    variants.configured(folder, **fields)
    with pytest.raises(InputError, match=message):
        adapters.attach(base_of(), folder)


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_tensors_that_are_no_weights_are_refused(kind: torch.dtype, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({n: t.to(kind) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"84 of its tensors are of type \w+ \(.* and 81 more\), which"):
        adapters.attach(base_of(), folder)


def test_two_tensors_for_one_place_and_numbers_among_the_tensors_are_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("lora_A.weight"))
    twice = name.replace("lora_A.weight", "lora_A.default.weight")
    save_file(tensors | {twice: tensors[name] * 0}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lora_A\.default\.weight, .*lora_A\.weight are for one place"):
        adapters.attach(base_of(), folder)
    save_file(tensors | {"step": torch.tensor(3.0)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 of its tensors has no place in the model \(step\)"):
        adapters.attach(base_of(), folder)


# ---- the base ----


@pytest.mark.parametrize(
    "name",
    ["/cache/hub/models--lab--qwen/snapshots/aa8e72", "unsloth/qwen-bnb-4bit", "D:\\models\\qwen", "lab/Qwen",
     "./", "other-lab/another-model/qwen"],
)  # fmt: skip
def test_a_base_of_another_name_is_taken_only_if_the_user_says_so(name: str, folder: Path) -> None:
    variants.configured(folder, base_model_name_or_path=name)
    base = base_of()
    with pytest.raises(
        InputError, match=r"not on .*qwen\. Take a run whose model\.id is its base\. .* --same-base"
    ):
        adapters.attach(base, folder)
    adapters.attach(base, folder, same_base=True)


def test_a_snapshot_in_the_hubs_cache_is_the_hub_id(folder: Path) -> None:
    base = base_of()
    as_hub = loading.LoadedModel(base.model, base.serialiser, base.family, "Lab/Qwen")
    snapshot = "/home/u/.cache/hub/models--lab--qwen/snapshots/aa8e72"
    variants.configured(folder, base_model_name_or_path=snapshot)
    adapters.attach(as_hub, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_moved_base_is_known_by_its_weights(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    model = AutoModelForCausalLM.from_pretrained(str(miniatures.path("qwen")), dtype=dtype)
    model.save_pretrained(moved)
    variants.configured(folder, base_model_name_or_path=str(moved))
    adapters.detach(adapters.attach(base_of(), folder))
    model.model.norm.weight.data *= 1.1
    model.save_pretrained(moved)
    with pytest.raises(
        InputError, match=r"whose weights are others\. Take a run whose model\.id is its base"
    ):
        adapters.attach(base_of(), folder)


@pytest.mark.parametrize("how", ["saved modules", "rows beside the adapter"])
@pytest.mark.parametrize("family", ["qwen", "llama2"])
def test_added_tokens_bring_their_embeddings(how: str, family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = variants.base_of(family)
    theirs.resize_token_embeddings(theirs.config.vocab_size + 3, mean_resizing=False)
    modules = ["embed_tokens", "lm_head"] if how == "saved modules" else None
    model = get_peft_model(theirs, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules)).eval()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs.get_input_embeddings().weight.data[-3:] += 0.3
    model.save_pretrained(tmp_path, save_embedding_layers=how != "saved modules")
    base = base_of(family)
    before, digest = logits(base.model), identify(base.model)
    attached = adapters.attach(base, tmp_path)
    new = torch.tensor([[5, 6, theirs.config.vocab_size - 1, 7]])
    with torch.no_grad():
        torch.testing.assert_close(attached(new).logits, model(new).logits, rtol=1e-4, atol=1e-4)
    with adapters.switched_off(attached):
        assert torch.equal(logits(attached), before)
    adapters.detach(attached)
    assert torch.equal(logits(base.model), before)
    assert identify(base.model) == digest


def test_whatever_belongs_to_an_adapter_is_in_its_digest(tmp_path: Path) -> None:
    for name in ("all biases", "saved head", "token rows", "dora", "IA3", "PROMPT_TUNING"):
        theirs = variants.saved(name, tmp_path / name)
        base = base_of()
        model = adapters.attach(base, tmp_path / name)
        digests = {identify(model)}
        owned = list(adapters.adapter_parameters(model))
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        assert sum(p.numel() for _, p in owned) >= sum(t.numel() for t in saved.values())
        for _, parameter in owned[:: max(1, len(owned) // 5)]:
            parameter.data.view(-1)[0] += 1
            digests.add(identify(model))
        assert len(digests) > min(5, len(owned)), name
        assert len({digest.base for digest in digests}) == 1, name
        del theirs


def test_a_digest_does_not_hang_on_the_order_in_which_parameters_come(tmp_path: Path) -> None:
    base = base_of("mixtral")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model = get_peft_model(base.model, config).eval()
    before, names = identify(model), [name for name, _ in model.named_parameters()]
    logits(model)
    assert [name for name, _ in model.named_parameters()] != names, "PEFT no longer changes the order"
    assert identify(model) == before


def test_an_adapter_is_exchanged_for_one_of_its_own_configuration_only(tmp_path: Path) -> None:
    theirs = variants.saved("lora", tmp_path / "one")
    other = variants.made("lora", noise=0.1)
    other.save_pretrained(str(tmp_path / "two"))
    stronger = variants.made("lora")
    stronger.peft_config["default"].lora_alpha = 64
    stronger.save_pretrained(str(tmp_path / "stronger"))
    variants.saved("pissa", tmp_path / "pissa")
    model = adapters.attach(base_of(), tmp_path / "one")
    with adapters.exchanged(model, tmp_path / "two") as now:
        torch.testing.assert_close(logits(now), logits(other))
    torch.testing.assert_close(logits(model), logits(theirs))
    for name, field in (("stronger", "lora_alpha"), ("pissa", "init_lora_weights")):
        with (
            pytest.raises(InputError, match=f"differs in {field} from the one in the model"),
            adapters.exchanged(model, tmp_path / name),
        ):
            pass


def test_token_rows_of_tied_embeddings_are_exchanged_though_their_file_holds_them_once(
    tmp_path: Path,
) -> None:
    first, second = (
        get_peft_model(base_of().model, TrainableTokensConfig(token_indices=[22])).eval() for _ in range(2)
    )
    for seed, model in enumerate((first, second)):
        torch.manual_seed(seed)
        torch.nn.init.normal_(next(p for p in model.parameters() if p.requires_grad))
    checkpoints.save_weights(second, tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 1, "head and embeddings are not tied"
    before = logits(first)
    with adapters.exchanged(first, tmp_path) as now:
        torch.testing.assert_close(logits(now), logits(second))
    assert torch.equal(logits(first), before)
    assert not torch.allclose(logits(second), before)


def test_a_model_whose_base_is_not_known_is_not_switched_off() -> None:
    for name, why in (("all biases", "trains biases of the base"), ("pissa", "replaces the weights")):
        with (
            pytest.raises(InputError, match=f"its adapter {why}.* and what the base was is not known here"),
            adapters.switched_off(variants.made(name)),
        ):
            pass


# ---- experts ----


def expert_adapter(folder: Path) -> Any:
    """An adapter whose expert tensors are named one by one, as before they were fused; its merged model."""
    torch.manual_seed(0)
    merged = variants.base_of("mixtral")
    config, rank, tensors = merged.config, 2, {}
    for layer, block in enumerate(merged.model.layers):
        experts = block.mlp.experts
        width = experts.gate_up_proj.shape[1] // 2
        for expert in range(config.num_local_experts):
            for name, weight in (
                ("w1", experts.gate_up_proj[expert, :width]),
                ("w3", experts.gate_up_proj[expert, width:]),
                ("w2", experts.down_proj[expert]),
            ):
                down = 0.1 * torch.randn(rank, weight.shape[1])
                up = 0.1 * torch.randn(weight.shape[0], rank)
                key = f"{PREFIX}layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
                weight.data += 2 * up @ down
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = LoraConfig(
        r=rank, lora_alpha=4, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM"
    ).to_dict()
    fields |= {
        "target_modules": ["w1", "w2", "w3"],
        "base_model_name_or_path": str(miniatures.path("mixtral")),
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields, default=str))
    return merged


def test_experts_may_be_named_one_by_one_or_together(tmp_path: Path) -> None:
    merged = expert_adapter(tmp_path / "one by one")
    base = base_of("mixtral")
    before = logits(base.model)
    model = adapters.attach(base, tmp_path / "one by one")
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-4)
    model.save_pretrained(str(tmp_path / "together"), save_embedding_layers=False)
    assert torch.equal(logits(adapters.detach(model)), before)
    again = adapters.attach(base, tmp_path / "together")
    torch.testing.assert_close(logits(again), logits(merged), rtol=1e-4, atol=1e-4)


def test_fused_experts_and_routers_are_exact(tmp_path: Path) -> None:
    variants.saved("fused experts and routers", tmp_path, "mixtral", noise=0.1)
    plain = PeftModel.from_pretrained(variants.base_of("mixtral"), str(tmp_path)).eval()
    base = base_of("mixtral")
    before = logits(base.model)
    model = adapters.attach(base, tmp_path)
    assert torch.equal(logits(model), logits(plain))
    with adapters.switched_off(model):
        assert torch.equal(logits(model), before)


# ---- 4 bit ----


@pytest.mark.parametrize("family", ["gemma", "qwen"])
def test_a_pass_without_gradients_leaves_the_gradients_of_4_bit_weights_as_they_were(family: str) -> None:
    model = loading.load(recipe.Model(family=family, id="miniature", quantisation="4bit"), "fp32").model
    states = torch.randn(1, 7, model.config.hidden_size, requires_grad=True)

    def gradient() -> torch.Tensor:
        states.grad = None
        model(inputs_embeds=states).logits.square().sum().backward()
        return states.grad.clone()

    before = gradient()
    logits(model)
    torch.testing.assert_close(gradient(), before)


def test_the_log_is_quiet_where_nothing_is_wrong(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        adapters.attach(base_of(), folder)
    assert caplog.text == ""


def test_whoever_says_same_base_of_another_is_warned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = base_of("llama3").id
    variants.configured(folder, base_model_name_or_path=other)
    with pytest.raises(InputError, match=r"whose weights are others\. Take a run"):
        adapters.attach(base_of(), folder)
    with caplog.at_level("WARNING", logger="safetynet"):
        adapters.attach(base_of(), folder, same_base=True)
    assert "whose weights are not those of" in caplog.text


def test_repeated_layers_change_something_even_where_every_update_is_zero(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    variants.saved("repeated layers", tmp_path, noise=0.0)
    base = base_of()
    before = logits(base.model)
    assert not torch.allclose(logits(adapters.attach(base, tmp_path)), before)
    assert "is zero" not in caplog.text
