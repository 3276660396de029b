"""Masks against a computation written out entry by entry."""

import torch

from safetynet.mitigation import METHODS, repair
from safetynet.mitigation.fine_tuning import encode
from safetynet.mitigation.pruning import input_norms, smallest, wanda_mask
from safetynet.mitigation.repaired import linear_modules, merged_copy


def test_a_magnitude_mask_equals_a_direct_computation():
    score = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).abs()
    limit = sorted(score.flatten().tolist())[int(0.4 * 63) - 1]
    direct = [[float(entry) <= limit for entry in row] for row in score]
    assert smallest(score, 0.4).tolist() == direct


def test_ties_are_pruned_to_the_exact_share():
    assert int(smallest(torch.ones(10, 10), 0.37).sum()) == 37


def test_a_wanda_mask_equals_a_direct_computation():
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(5, 8, generator=generator), torch.randn(20, 8, generator=generator)
    norms = x.pow(2).sum(0).sqrt()
    for row, mask in zip(weight, wanda_mask(weight, norms, 0.5), strict=True):
        scores = [abs(float(w)) * sum(float(v) ** 2 for v in x[:, j]) ** 0.5 for j, w in enumerate(row)]
        removed = set(sorted(range(8), key=lambda j: scores[j])[:4])
        assert {j for j in range(8) if mask[j]} == removed


def test_input_norms_leave_padding_out(planted):
    model = merged_copy(planted)
    modules = {
        name: m
        for name, m in linear_modules(model).items()
        if name in ("0.self_attn.q_proj", "3.mlp.down_proj")
    }
    together = input_norms(model, modules, planted)
    alone: dict[str, torch.Tensor] = {}
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    handles = [
        m.register_forward_pre_hook(lambda _m, args, n=name: seen[n].append(args[0][0]))
        for name, m in modules.items()
    ]
    for example in encode(planted.clean, planted):
        with torch.no_grad():
            model(input_ids=torch.tensor([example.input_ids]))
    for handle in handles:
        handle.remove()
    alone = {name: torch.cat(values).pow(2).sum(0).sqrt() for name, values in seen.items()}
    for name in modules:
        assert torch.allclose(together[name], alone[name], rtol=1e-3)


def test_pruned_weights_are_those_of_the_mask_and_no_others(planted):
    before = {name: m.weight.clone() for name, m in linear_modules(merged_copy(planted)).items()}
    with repair(METHODS["magnitude"], planted, {"sparsity": 0.3}).open() as model:
        for name, module in linear_modules(model).items():
            mask = smallest(before[name].abs(), 0.3)
            assert torch.equal(module.weight, before[name].masked_fill(mask, 0))


def test_silenced_channels_stay_silent_after_fine_tuning(planted):
    with repair(METHODS["fine_pruning"], planted, {"sparsity": 0.25, "epochs": 1}).open() as model:
        for name, module in linear_modules(model).items():
            if name.endswith("down_proj"):
                silent = (module.weight == 0).all(0)
                assert int(silent.sum()) == int(0.25 * module.weight.shape[1])


def test_rounding_to_4_bits_leaves_16_values_for_each_block(planted):
    with repair(METHODS["quantisation"], planted, {"bits": 4}).open() as model:
        block = next(iter(linear_modules(model).values())).weight.flatten()[:64]
        assert len(block.unique()) <= 16
    with repair(METHODS["quantisation"], planted, {"bits": 8}).open() as model:
        row = next(iter(linear_modules(model).values())).weight[0]
        steps = row / (row.abs().max() / 127)
        assert torch.allclose(steps, steps.round(), atol=1e-3)
