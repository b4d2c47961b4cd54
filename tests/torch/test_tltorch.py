"""tensorly-torch's Tucker tensors train under the optimizer, otherwise untouched."""

import pytest
import torch
from torch import nn

import geotucker as gt
from geotucker.testing import check_orthonormal
from geotucker_torch import (
    TDLRT,
    CheckpointError,
    factorize,
    load_checkpoint,
    save_checkpoint,
)


def layers(tltorch):
    """Return the layers to test, each with the shape of its input."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    linear = tltorch.FactorizedLinear((2, 4), (3, 4), factorization="tucker", rank=0.5)
    linear.weight.normal_(0, 0.3)
    regression = tltorch.TRL((4, 3), (5,), factorization="tucker", rank=(2, 2, 2))
    nn.init.zeros_(regression.bias) if regression.bias is not None else None
    regression.weight.normal_(0, 0.3)
    build = tltorch.FactorizedConv.from_conv
    return {
        "factorized conv": (
            build(conv, rank=(4, 3, 3, 3), factorization="tucker", implementation="factorized"),
            (8, 4, 5, 5),
        ),
        "reconstructed conv": (
            build(conv, rank=(4, 3, 3, 3), factorization="tucker", implementation="reconstructed"),
            (8, 4, 5, 5),
        ),
        "linear": (linear, (8, 8)),
        "regression": (regression, (8, 4, 3)),
    }


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("rule", [gt.Tolerance(0.1), gt.Fixed(2)], ids=["tolerance", "fixed"])
@pytest.mark.parametrize("name", ["factorized conv", "reconstructed conv", "linear", "regression"])
def test_trains(tltorch, name, rule, every):
    layer, shape = layers(tltorch)[name]
    x = torch.randn(shape)
    with torch.no_grad():
        target = torch.randn_like(layer(x))
    optimizer = TDLRT(
        torch.optim.SGD(layer.parameters(), 0.05, momentum=0.5), layer, rule, basis_every=every
    )

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < losses[0]
    check_orthonormal((layer.weight.core.detach(), [f.detach() for f in layer.weight.factors]))
    ranks = tuple(layer.weight.core.shape)
    assert tuple(layer.weight.rank) == ranks
    if hasattr(layer, "rank"):
        assert tuple(layer.rank) == ranks
    if isinstance(rule, gt.Fixed):
        assert max(ranks) == 2
    with torch.no_grad():
        weight = layer.weight.to_tensor()
    torch.testing.assert_close(weight, gt.to_dense(optimizer._slots[0].point))


@pytest.mark.parametrize("late_check", [False, True])
def test_no_optimizer_steps_bases_between_two_changes_of_them(tltorch, late_check):
    layer, shape = layers(tltorch)["factorized conv"]
    inner = torch.optim.SGD(layer.parameters(), 0.05, momentum=0.5, weight_decay=0.1)
    optimizer = TDLRT(inner, layer, basis_every=3, late_check=late_check)
    x = torch.randn(shape)

    def closure():
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = optimizer._slots[0].point
    factors = [factor.clone() for factor in before.factors]
    core = before.core.clone()
    for _ in range(2):  # without a closure, which these steps do not need
        closure()
        optimizer.step()
    after = optimizer._slots[0].point
    assert not torch.equal(after.core, core)
    assert all(map(torch.equal, after.factors, factors))
    assert not any(factor in optimizer.state for factor in optimizer._slots[0].factors)


def test_trains_as_our_own_layer(tltorch):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    ranks = (4, 3, 3, 3)
    build = tltorch.FactorizedConv.from_conv
    theirs = build(conv, rank=ranks, factorization="tucker", implementation="factorized").double()
    ours = factorize(nn.Sequential(conv), ranks, verbose=False).double()
    with torch.no_grad():  # from_conv iterates, so its starting weight is not the HOSVD
        start = gt.orthonormalise((theirs.weight.core, theirs.weight.factors))
        for parameter, value in zip(
            (ours[0].core, *ours[0].factors), (start.core, *start.factors), strict=True
        ):
            parameter.copy_(value)
    x = torch.randn(8, 4, 5, 5).double()
    for model in (theirs, ours):
        optimizer = TDLRT(
            torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), model, integrator="tdlrt"
        )

        def closure(net=model, opt=optimizer):
            opt.zero_grad()
            loss = (net(x) - 1).square().mean()
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["factorized conv", "reconstructed conv", "linear", "regression"])
def test_a_training_at_changed_ranks_goes_on_from_a_checkpoint(tltorch, name, tmp_path):
    def build():
        layer, shape = layers(tltorch)[name]
        adam = torch.optim.Adam(layer.parameters(), 0.01)
        return layer, TDLRT(adam, layer, gt.Fixed(1)), shape

    def advance(layer, optimizer, shape, seeds):
        for seed in seeds:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

            def closure():
                optimizer.zero_grad()
                loss = (layer(x) - 1.0).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)

    unbroken = build()
    start = unbroken[1].ranks
    advance(*unbroken, range(4))
    assert unbroken[1].ranks != start
    save_checkpoint(tmp_path / "file", *unbroken[:2])
    advance(*unbroken, range(4, 8))
    resumed = build()
    ranked = [(m, m.rank) for m in resumed[0].modules() if hasattr(m, "rank")]
    before = [p.detach().clone() for p in resumed[0].parameters()]
    resumed[0].register_buffer("more", torch.ones(1))
    with pytest.raises(CheckpointError, match=r"Missing key.*more"):
        load_checkpoint(tmp_path / "file", resumed[0])
    del resumed[0].more
    assert all(m.rank == rank for m, rank in ranked)
    assert all(map(torch.equal, resumed[0].parameters(), before))
    load_checkpoint(tmp_path / "file", *resumed[:2])
    advance(*resumed, range(4, 8))
    assert resumed[1].ranks == unbroken[1].ranks
    assert all(map(torch.equal, resumed[0].parameters(), unbroken[0].parameters()))
