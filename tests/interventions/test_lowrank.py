import numpy as np
import pytest
import torch

from safetynet.engine.batch import Batch
from safetynet.engine.hooks import intervening
from safetynet.engine.sites import Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.interventions.lowrank import explained_variance, principal_components


def values(model, rows, site):
    return torch.cat([trace(model, Batch.of([row]), [site]).value(site)[0] for row in rows]).numpy()


@pytest.mark.parametrize("component", ["attn_out", "mlp_out"])
def test_streamed_components_are_those_of_all_tokens_at_once(model, rows, component):
    site = Site(component, 1)
    found = principal_components(model, rows, site, tokens=20)
    everything = values(model, rows, site)
    assert found.count == len(everything) == sum(map(len, rows))
    covariance = np.cov(everything.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found.mean, everything.mean(0), atol=1e-4)
    scale = covariance.trace()
    rebuilt = found.basis.T.double() @ torch.diag(found.variance) @ found.basis.double()
    np.testing.assert_allclose(rebuilt / scale, covariance / scale, atol=1e-5)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(32), atol=1e-5)
    assert (found.variance.diff() <= 0).all()


def test_full_rank_changes_nothing_and_rank_0_leaves_the_mean(model, rows):
    batch = Batch.of(rows)
    found = principal_components(model, rows, Site("mlp_out", 1))
    plain = trace(model, batch, [Site("resid_mid", 1)])
    for rank, expected in (
        (32, plain.value(Site("resid_post", 1))),
        (0, plain.value(Site("resid_mid", 1)) + found.mean),
    ):
        with intervening(model, [found.edit(rank)]):
            after = trace(model, batch).value(Site("resid_post", 1))
        mask = batch.mask.bool()
        np.testing.assert_allclose(after[mask], expected[mask], atol=2e-4)


def test_explained_share_is_that_of_the_squared_deviation(build, rows):
    model, site = build("llama"), Site("attn_out", 0)
    found = principal_components(model, rows[:4], site)
    table = explained_variance(model, found, rows[4:])
    expected = []
    for row in rows[4:]:
        deviation = values(model, [row], site) - found.mean.numpy()
        along = deviation @ found.basis[:3].numpy().T
        expected.append((along**2).sum() / (deviation**2).sum())
    assert table["rank"].tolist() == list(range(1, 33)) and set(table["n"]) == {2}
    np.testing.assert_allclose(table["value"][2], np.mean(expected), rtol=1e-4)
    assert table["value"].is_monotonic_increasing and table["control"].is_monotonic_increasing
    np.testing.assert_allclose(table[["value", "control"]].iloc[-1], 1)


def test_a_planted_plane_is_found(build, rows):
    model, site = build("llama", num_hidden_layers=1), Site("mlp_out", 0)
    rank2 = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))

    def flatten(_module, _args, output):
        return output[..., :2] @ rank2

    hook = model.get_base_model().model.layers[0].mlp.register_forward_hook(flatten)
    found = principal_components(model, rows, site)
    table = explained_variance(model, found, rows)
    hook.remove()
    assert found.variance[2] < 1e-6 * found.variance[1]
    np.testing.assert_allclose(table["value"][1], 1, atol=1e-5)
    assert table["control"][1] < 0.5


def test_random_components_keep_as_many_directions(build, rows):
    found = principal_components(build("qwen"), rows, Site("mlp_out", 0))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    for edit in (found.edit(3), found.random_edit(3)):
        assert torch.linalg.matrix_rank(edit.change(x) - found.mean, atol=1e-3) == 3
        assert torch.allclose(edit.change(edit.change(x)), edit.change(x), atol=1e-4)


def test_ranks_and_sites_that_do_not_exist_are_refused(build, rows):
    model = build("qwen")
    with pytest.raises(InputError, match="rank 40: mlp_out 0 has components 1 to 32"):
        principal_components(model, rows, Site("mlp_out", 0)).edit(40)
    with pytest.raises(InputError, match="layer 7 does not exist"):
        principal_components(model, rows, Site("mlp_out", 7))
    with pytest.raises(InputError, match="1 token is too few"):
        principal_components(model, [[5]], Site("mlp_out", 0))
