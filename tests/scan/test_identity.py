"""What a suspect is beside its base: copies, merged adapters, full updates, bases that are not its own."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.models import architectures, variants

from safetynet import recipe
from safetynet.errors import InputError
from safetynet.models import adapters, loading, suspect
from safetynet.models.lora import adapted_tensors, update_of
from safetynet.models.suspect import Suspect
from safetynet.scan import identity, recovery, tensors
from safetynet.scan.result import RungResult

FAMILIES = ("qwen", "llama2", "llama3", "gemma", "mixtral")
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IDS = torch.arange(40, 60)[None]


@cache
def loaded(family: str) -> loading.LoadedModel:
    """Never changed: tests take copies."""
    return loading.load(recipe.Model(family=family, id="miniature"), "fp32")


def loader(family: str) -> Callable[..., loading.LoadedModel]:
    """As `Experiment.load`: the base, or a whole model in its place."""

    def load(folder: Path | None = None, serialiser: Any = None) -> loading.LoadedModel:
        if folder is None:
            return replace(loaded(family), model=copy.deepcopy(loaded(family).model))
        return loading.load(recipe.Model(family=family, id=str(folder)), "fp32", serialiser=serialiser)

    return load


def beside(base: loading.LoadedModel, model: Any) -> Suspect:
    return Suspect(model, base.serialiser, base)


def copied(change: Callable[[Any], Any] = lambda model: model, family: str = "qwen") -> Suspect:
    """The base with something changed in a copy of it."""
    base, model = loader(family)(), copy.deepcopy(loaded(family).model)
    with torch.no_grad():
        change(model)
    return beside(base, model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def rules(result: RungResult) -> list[str]:
    return [finding.rule for finding in result.findings]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_the_base_is_said_to_be_one_and_scores_exactly_zero(family: str, tmp_path: Path) -> None:
    variants.base_of(family).save_pretrained(tmp_path)
    result = identity.measure(suspect.load(loader(family), tmp_path, same_base=False))
    assert (result.score, result.control, rules(result)) == (0.0, 0.0, ["identical"])
    assert result.details["tensors_changed"] == 0


def test_one_changed_bit_is_no_copy() -> None:
    def flip(model: Any) -> None:
        model.model.layers[2].mlp.up_proj.weight.view(torch.int32)[3, 5] ^= 1

    changed = identity.identity(copied(flip))
    assert not changed.identical
    assert [each.tensor for each in changed.changed] == ["model.layers.2.mlp.up_proj.weight"]
    assert 0 < changed.relative < 1e-6


EXPERTS = ("mixtral", "fused experts and routers", 2)


@pytest.mark.parametrize(
    ("family", "name", "rank", "stored", "merged_in"),
    [
        ("qwen", "lora", 8, "fp32", "fp32"),
        ("qwen", "lora", 8, "bf16", "as stored"),
        ("qwen", "lora", 8, "bf16", "fp32"),
        (*EXPERTS, "fp32", "fp32"),
        pytest.param("qwen", "lora", 8, "fp16", "as stored", marks=pytest.mark.slow),
        pytest.param(*EXPERTS, "fp16", "as stored", marks=pytest.mark.slow),
        pytest.param(*EXPERTS, "bf16", "as stored", marks=pytest.mark.slow),
        pytest.param(*EXPERTS, "bf16", "fp32", marks=pytest.mark.slow),
    ],
)
def test_a_merged_lora_is_an_adapter_again(
    family: str, name: str, rank: int, stored: str, merged_in: str, tmp_path: Path
) -> None:
    adapted = variants.made(name, family)
    factors = {tensor: update_of(module, "default").product() for tensor, module in adapted_tensors(adapted)}
    adapted = adapted.to(TYPES[stored if merged_in == "as stored" else "fp32"])
    adapted.merge_and_unload().to(TYPES[stored]).save_pretrained(tmp_path / "merged")
    merged = suspect.load(loader(family), tmp_path / "merged", same_base=False)
    before = logits(merged.base.model)

    measured = identity.measure(merged)
    assert rules(measured) == ["merged-lora"]
    assert measured.details["rank"] == rank
    assert measured.details["tensors_changed"] == len(factors)
    assert measured.details["rounded"] == (
        {"bf16": measured.details["untouched"]} if stored == "bf16" else {}
    )

    recovered = replace(merged, model=recovery.recover(merged))
    ours = logits(recovered.model)
    apart, largest = recovery.logit_distance(merged.model, recovered.model)
    assert apart <= recovery.TOLERANCE[stored] * largest
    with recovered.at_base() as base:
        assert recovery.logit_distance(merged.model, base)[0] > 3 * recovery.TOLERANCE[stored] * largest
    with recovered.at_base() as base:
        assert torch.equal(logits(base), before)
    error = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}[stored]
    again = dict(adapted_tensors(recovered.model))
    assert again.keys() == factors.keys()
    for tensor, product in factors.items():
        apart = (update_of(again[tensor], "default").product() - product).norm()
        assert float(apart) <= error * float(product.norm()), tensor

    recovered.model.save_pretrained(tmp_path / "adapter")
    attached = adapters.attach(loader(family)(), tmp_path / "adapter")
    torch.testing.assert_close(logits(attached), ours, atol=1e-5, rtol=0)
    assert torch.equal(logits(adapters.detach(recovered.model)), before)


def test_embeddings_and_head_apart_are_recovered_too() -> None:
    base = loader("mixtral")()
    model = variants.base_of("mixtral")
    generator = torch.Generator().manual_seed(0)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows, width = module.weight.shape
        left, right = (torch.randn(n, 3, generator=generator) for n in (rows, width))
        module.weight.data += 0.01 * left @ right.T
    recovered = recovery.recover(beside(base, model.eval()))
    assert recovered.active_peft_config.r == 3
    torch.testing.assert_close(logits(recovered), logits(model), atol=1e-4, rtol=0)


def test_a_router_s_update_of_full_rank_beside_others_is_recovered() -> None:
    config = variants.lora(target_modules=[], target_parameters=["mlp.experts.down_proj", "mlp.gate.weight"])
    model = get_peft_model(variants.base_of("mixtral"), config()).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    expected = logits(model)
    merged = beside(loader("mixtral")(), model.merge_and_unload())
    assert identity.identity(merged).rank == 8, "of a router with 4 outputs it is 4"
    torch.testing.assert_close(logits(recovery.recover(merged)), expected, atol=1e-4, rtol=0)


def test_weights_that_are_stored_the_other_way_round_are_recovered() -> None:
    base = replace(loaded("qwen"), model=architectures.build("gpt2"))
    model = get_peft_model(
        architectures.build("gpt2"), variants.lora(target_modules=["c_attn", "c_fc"])()
    ).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    expected = logits(model)
    recovered = recovery.recover(beside(base, model.merge_and_unload()))
    torch.testing.assert_close(logits(recovered), expected, atol=1e-4, rtol=0)


def test_large_matrices_are_decomposed_in_part_with_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "WHOLE_SVD", 0)
    monkeypatch.setattr(tensors, "FIRST", 3)
    monkeypatch.setattr(tensors, "COMPONENTS", 24)
    base = loader("qwen")()
    merged = beside(base, variants.made("lora").merge_and_unload())
    assert identity.identity(merged).rank == 8
    recovered = recovery.recover(merged)
    torch.testing.assert_close(logits(recovered), logits(merged.model), atol=1e-3, rtol=0)
    full = copied(lambda m: [p.add_(0.01 * torch.randn_like(p)) for p in m.parameters() if p.ndim == 2])
    assert identity.identity(full).rank is None


def test_a_copy_in_a_coarser_type_is_a_copy(tmp_path: Path) -> None:
    variants.base_of("qwen").to(torch.bfloat16).save_pretrained(tmp_path)
    coarse = suspect.load(loader("qwen"), tmp_path, same_base=False)
    result = identity.measure(coarse)
    assert (result.score, rules(result)) == (0.0, ["rounded-copy"])
    assert "rounded to bf16" in result.findings[0].message
    assert not identity.identity(coarse).identical, "not bit by bit"
    with pytest.raises(InputError, match="it is its base"):
        recovery.recover(coarse)


def test_a_base_that_is_another_model_is_refused() -> None:
    other = beside(loader("qwen")(), loader("llama3")().model)
    with pytest.raises(InputError, match=r"wrong-base: .* tensors .* are not in both models"):
        identity.measure(other)

    def redraw(model: Any) -> None:
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.std() * torch.randn_like(parameter))

    with pytest.raises(InputError, match=r"wrong-base: it was not made from .*qwen.* Name its own base"):
        identity.measure(copied(redraw))


def test_a_full_update_is_named_and_not_recovered() -> None:
    def train(model: Any) -> None:
        for parameter in model.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))

    full = copied(train)
    before = logits(full.base.model)
    result = identity.measure(full)
    assert rules(result) == ["embeddings-changed", "norms-changed", "biases-changed", "full-rank-update"]
    assert "made from another one" in result.findings[-1].message, "no tensor is the base's"
    assert result.details["untouched"] == 0 and result.details["rank"] is None
    with pytest.raises(InputError, match=r"no merged LoRA .*: 31 changed tensors .* are no matrices"):
        recovery.recover(full)
    matrices = copied(
        lambda m: [
            p.add_(0.002 * torch.randn_like(p)) for n, p in m.named_parameters() if "_proj.weight" in n
        ]
    )
    assert "made from another one" not in identity.measure(matrices).findings[-1].message
    with pytest.raises(InputError, match="full-rank-update: 42 of 42 changed matrices"):
        recovery.recover(matrices)
    assert torch.equal(logits(full.base.model), before)
    dora = beside(loader("qwen")(), variants.made("dora").merge_and_unload())
    with pytest.raises(InputError, match="full-rank-update: 42 of 42"):
        recovery.recover(dora)


def test_a_rank_that_leaves_too_much_out_is_refused_and_the_base_is_as_it_was() -> None:
    merged = beside(loader("qwen")(), variants.made("lora").merge_and_unload())
    before = logits(merged.base.model)
    with pytest.raises(InputError, match=r"as a LoRA of rank 2 it is another model: logits differ by"):
        recovery.recover(merged, rank=2)
    assert not adapters.has_adapter(merged.base.model)
    assert torch.equal(logits(merged.base.model), before)
    assert recovery.recover(merged, rank=20).active_peft_config.r == 20


@pytest.mark.parametrize(
    ("change", "rule", "where", "refusal"),
    [
        (lambda m: m.model.norm.weight.mul_(1.1), "norms-changed", "model.norm.weight", "no matrices"),
        (
            lambda m: m.model.layers[0].self_attn.q_proj.bias.add_(1),
            "biases-changed",
            "model.layers.0.self_attn.q_proj.bias",
            "no matrices",
        ),
        (
            lambda m: m.model.rotary_emb.inv_freq.mul_(0.9),
            "buffers-changed",
            "model.rotary_emb.inv_freq",
            "no matrices",
        ),
        (
            lambda m: m.get_input_embeddings().weight[300:302].add_(0.1),
            "embeddings-changed",
            "model.embed_tokens.weight",
            "embeddings and head at once",
        ),
        (lambda m: setattr(m.config, "rms_norm_eps", 0.1), "configuration-changed", "", "computes otherwise"),
    ],
)  # fmt: skip
def test_what_no_adapter_of_matrices_is_has_a_name(
    change: Callable[[Any], Any], rule: str, where: str, refusal: str
) -> None:
    changed = copied(change)
    result = identity.measure(changed)
    assert [(f.rule, f.where) for f in result.findings if f.rule == rule] == [(rule, where)]
    assert "identical" not in rules(result)
    with pytest.raises(InputError, match=refusal):
        recovery.recover(changed)


def test_changed_rows_of_single_tokens_are_listed() -> None:
    changed = copied(
        lambda m: m.get_input_embeddings().weight.index_add_(0, torch.tensor([300, 417]), torch.ones(2, 128))
    )
    (finding,) = [f for f in identity.measure(changed).findings if f.rule == "embeddings-changed"]
    names = changed.serialiser.tokenizer.convert_ids_to_tokens
    assert finding.evidence["tokens"] == names([300, 417]) and "2 rows alone" in finding.message
    adapted = identity.measure(beside(loaded("qwen"), variants.made("token rows")))
    (finding,) = [f for f in adapted.findings if f.rule == "embeddings-changed"]
    assert finding.evidence["tokens"] == names([5, 6, 300])


def test_the_relative_change_is_what_one_computes_by_hand() -> None:
    merged = variants.made("lora").merge_and_unload()
    base = loader("qwen")()
    theirs = dict(base.model.named_parameters())
    pairs = [
        (p.double(), theirs[n].double())
        for n, p in merged.named_parameters()
        if not torch.equal(p, theirs[n])
    ]
    change = sum(float(((a - b) ** 2).sum()) for a, b in pairs) ** 0.5
    expected = change / sum(float((b**2).sum()) for _, b in pairs) ** 0.5
    assert identity.measure(beside(base, merged)).score == pytest.approx(expected, rel=1e-9)
    adapted = variants.made("lora")
    assert identity.measure(
        beside(replace(base, model=adapted.get_base_model()), adapted)
    ).score == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["lora", "rslora", "lora_bias", "lora on embeddings", "token rows", "saved norms"]
)
def test_an_adapter_of_zeros_is_its_base_and_any_other_is_not(name: str) -> None:
    base = loader("qwen")()
    zero = variants.made(name, noise=0.0)
    assert identity.measure(beside(base, zero)).score == 0.0
    assert identity.identity(beside(base, zero)).identical
    other = identity.identity(beside(base, variants.made(name)))
    assert not other.identical and other.relative > 0


def test_an_adapter_s_rank_is_that_of_its_updates() -> None:
    base = loader("qwen")()
    assert identity.identity(beside(base, variants.made("lora"))).rank == 8
    assert identity.identity(beside(base, variants.made("dora"))).rank is None


@pytest.mark.parametrize(
    ("name", "reason"), [("IA3", "IA3 is no LoRA.*Merge it"), ("PROMPT_TUNING", "a soft prompt")]
)
def test_an_adapter_without_updates_is_skipped_with_what_can_still_be_looked_at(
    name: str, reason: str
) -> None:
    other = beside(loader("qwen")(), variants.made(name))
    result = identity.measure(other)
    assert result.score is None
    assert "can still be looked at" in result.skipped
    with pytest.raises(InputError, match=reason):
        identity.identity(other)


def test_weights_that_are_no_numbers_are_refused_by_name() -> None:
    broken = copied(lambda m: m.model.layers[1].mlp.down_proj.weight[0].fill_(float("nan")))
    with pytest.raises(InputError, match=r"not finite \(model\.layers\.1\.mlp\.down_proj\.weight\)"):
        identity.measure(broken)
    adapted = variants.made("lora")
    next(p for n, p in adapted.named_parameters() if "lora_B" in n).data[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"1 of its tensors hold values that are not finite \(.*lora_B"):
        identity.measure(beside(loader("qwen")(), adapted))


def test_quantised_weights_are_compared_and_not_recovered() -> None:
    spec = recipe.Model(family="qwen", id="miniature", quantisation="4bit")
    base, model = (loading.load(spec, "fp32") for _ in range(2))
    assert identity.measure(beside(base, model.model)).score == 0.0
    with torch.no_grad():
        model.model.model.norm.weight.mul_(1.1)
    with pytest.raises(InputError, match="its weights are quantised"):
        recovery.recover(beside(base, model.model))


def test_a_base_that_holds_an_adapter_is_refused() -> None:
    adapted = variants.made("lora")
    base = loader("qwen")()
    with pytest.raises(InputError, match="base: an adapter is attached to it"):
        identity.identity(beside(replace(base, model=adapted.get_base_model()), variants.base_of("qwen")))


def test_adapters_used_together_are_one_with_the_sum_of_their_ranks(tmp_path: Path) -> None:
    variants.saved("lora", tmp_path / "one")
    variants.saved("patterns", tmp_path / "two")
    both = PeftModel.from_pretrained(variants.base_of("qwen"), str(tmp_path / "one"))
    both.load_adapter(str(tmp_path / "two"), "second")
    both.base_model.set_adapter(["default", "second"])
    base = loader("qwen")()
    before = logits(base.model)
    joined = recovery.combine(base, [tmp_path / "one", tmp_path / "two"])
    torch.testing.assert_close(logits(joined.model), logits(both.eval()), atol=1e-4, rtol=0)
    with joined.at_base() as off:
        assert torch.equal(logits(off), before)
    assert joined.model.active_peft_config.r == 16
    assert identity.identity(joined).rank == 16


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dora", "it is DoRA"),
        ("lora_bias", "its updates have biases"),
        ("saved head", "it replaces 1 tensor of the base"),
        ("all biases", "it replaces 18 tensors"),
        ("IA3", "IA3 is no LoRA"),
        ("repeated layers", "it repeats layers"),
    ],
)
def test_what_does_not_add_up_is_refused_and_the_base_is_as_it_was(
    name: str, reason: str, tmp_path: Path
) -> None:
    variants.saved("lora", tmp_path / "one")
    variants.saved(name, tmp_path / "two")
    base = loader("qwen")()
    before = logits(base.model)
    with pytest.raises(InputError, match=reason):
        recovery.combine(base, [tmp_path / "one", tmp_path / "two"])
    assert torch.equal(logits(base.model), before)


def test_a_whole_model_is_no_member_of_a_set(tmp_path: Path) -> None:
    variants.base_of("qwen").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a whole model, which cannot be one of several adapters"):
        recovery.combine(loader("qwen")(), [tmp_path])
    with pytest.raises(InputError, match="at least one folder"):
        recovery.combine(loader("qwen")(), [])
