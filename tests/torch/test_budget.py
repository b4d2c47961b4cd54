"""Budgets, schedules and descent-safe ranks under the optimizer."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import geotucker as gt
from geotucker_torch import TDLRT, TuckerLinear, factorize


def problem(seed=0):
    """Return a network with layers outside of the Tucker format too, and full-batch data."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 9, 60), nn.ReLU(), nn.Linear(60, 10),
    )  # fmt: skip
    return model, torch.randn(32, 3, 8, 8), torch.randint(10, (32,))


def train(model, optimizer, x, y, steps):
    sizes = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        sizes.append(sum(p.numel() for p in model.parameters()))
    return sizes, loss.item()


@pytest.mark.parametrize("share", [0.2, 0.08])
def test_a_budget_is_reached_on_schedule_and_held(share):
    model, x, y = problem()
    dense = sum(p.numel() for p in model.parameters())
    factorize(model, 0.5, verbose=False)
    start = sum(p.numel() for p in model.parameters())
    sgd = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    optimizer = TDLRT(sgd, model, gt.Budget(parameters=share, steps=30))
    sizes, loss = train(model, optimizer, x, y, 150)
    assert share * dense < sizes[10] < start
    assert all(0.99 * share <= size / dense <= share for size in sizes[31:])
    assert loss < 0.5


def test_without_a_schedule_it_holds_at_once():
    model, x, y = problem()
    dense = sum(p.numel() for p in model.parameters())
    factorize(model, 0.5, verbose=False)
    optimizer = TDLRT(torch.optim.Adam(model.parameters(), 1e-3), model, gt.Budget(parameters=0.1))
    sizes, _ = train(model, optimizer, x, y, 3)
    assert all(0.099 <= size / dense <= 0.1 for size in sizes)


def test_the_schedule_goes_on_after_a_restart():
    model, x, y = problem()
    factorize(model, 0.5, verbose=False)
    optimizer = TDLRT(
        torch.optim.SGD(model.parameters(), 0.02, momentum=0.9), model,
        gt.Budget(parameters=0.1, steps=20),
    )  # fmt: skip
    train(model, optimizer, x, y, 10)
    twin = copy.deepcopy(model)
    again = TDLRT(
        torch.optim.SGD(twin.parameters(), 0.02, momentum=0.9), twin,
        gt.Budget(parameters=0.1, steps=20),
    )  # fmt: skip
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ends = [train(net, opt, x, y, 10) for net, opt in ((model, optimizer), (twin, again))]
    assert ends[0] == ends[1]
    assert again._sensitivities == optimizer._sensitivities


def test_sensitivities_are_those_of_core_and_gradient():
    model, x, y = problem()
    factorize(model, 0.5, verbose=False)
    sgd = torch.optim.SGD(model.parameters(), 0.02)
    optimizer = TDLRT(sgd, model, gt.Budget(parameters=0.3), basis_every=1)
    seen = []
    for _ in range(3):
        layers = {name: layer for name, layer in model.named_modules() if name in optimizer.ranks}
        before = {name: layer.core.detach().clone() for name, layer in layers.items()}
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        narrow = {
            name: layer.core.grad[tuple(slice(rank) for rank in before[name].shape)]
            for name, layer in layers.items()
        }
        found = {
            name: float(before[name].square().sum() * narrow[name].square().mean())
            for name in layers
        }
        seen.append(found)
        optimizer.step()
    means = {name: sum(found[name] for found in seen) / 3 for name in seen[0]}
    assert optimizer._sensitivities.means == pytest.approx(means, rel=1e-4)


@pytest.mark.parametrize("means", [3, {"0": "x"}, {"0": torch.nan}])
def test_sensitivities_that_are_none_are_not_loaded(means):
    model, _, _ = problem()
    factorize(model, 0.5, verbose=False)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.02), model, gt.Budget(parameters=0.3))
    broken = optimizer.state_dict()
    broken["tdlrt"]["sensitivities"] = {"means": means, "counts": {"0": 1}}
    with pytest.raises(ValueError, match=r"state_dict|could not convert|means"):
        optimizer.load_state_dict(broken)
    assert optimizer._sensitivities.means == {}


def test_a_failed_step_leaves_the_sensitivities():
    model, x, y = problem()
    factorize(model, 0.5, verbose=False)
    sgd = torch.optim.SGD(model.parameters(), 0.02)
    optimizer = TDLRT(sgd, model, gt.Budget(parameters=0.3))
    train(model, optimizer, x, y, 2)
    before = optimizer._sensitivities
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    model[0].bias.grad[0] = torch.nan
    with pytest.raises(gt.NonFiniteError):
        optimizer.step()
    assert optimizer._sensitivities is before


def test_fixed_ranks_need_no_sensitivities():
    model, x, y = problem()
    factorize(model, 0.5, verbose=False)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.02), model)
    train(model, optimizer, x, y, 2)
    assert optimizer._sensitivities.means == {}


def test_a_budget_for_some_layers_is_a_share_of_these():
    model, x, y = problem()
    factorize(model, 0.5, verbose=False)
    optimizer = TDLRT(
        torch.optim.SGD(model.parameters(), 0.02), model, {"6": gt.Budget(parameters=0.1)}
    )
    first = optimizer.ranks
    train(model, optimizer, x, y, 2)
    assert {k: v for k, v in optimizer.ranks.items() if k != "6"} == {
        k: v for k, v in first.items() if k != "6"
    }
    assert model[6].ranks == (4, 4)  # the most that fits: 1,408 of at most 1,728


def test_operations():
    model, x, y = problem()
    factorize(model, 0.5, verbose=False)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.02), model, gt.Budget(flops=0.2))
    train(model, optimizer, x, y, 2)

    def operations(net):
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x)
        return counter.get_total_flops()

    layers = [layer for layer in model if hasattr(layer, "core")]
    assert len(layers) > 2
    dense = operations(problem()[0]) - 0.0
    assert operations(model.eval()) < 0.35 * dense  # what counts besides: folding the kernels


def test_a_budget_that_cannot_be_met_is_refused_at_once():
    model, _, _ = problem()
    factorize(model, 0.5, verbose=False)
    with pytest.raises(gt.RankError, match="parameters: expected more than"):
        TDLRT(torch.optim.SGD(model.parameters(), 0.1), model, gt.Budget(parameters=0.001))


def test_descent_safe_truncation_never_costs_more_than_the_step_has_won():
    torch.manual_seed(0)
    model = factorize(
        nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)), 6, verbose=False
    ).double()
    x, y = torch.randn(60, 20).double(), torch.randn(60, 10).double()

    def losses(rule):
        net, values = copy.deepcopy(model), []
        for phase, steps in ((None, 100), (rule, 20)):
            sgd = torch.optim.SGD(net.parameters(), 0.05)
            optimizer = TDLRT(sgd, net, phase, integrator="tdlrt")
            for _ in range(steps):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(net(x), y)
                loss.backward()
                optimizer.step()
                values.append(loss.item())
        return values[100:]

    safe = losses(gt.DescentSafe(0.5, cap=12))
    assert all(after < before for before, after in pairwise(safe))
    coarse = losses(gt.Tolerance(0.7))
    assert any(after > before for before, after in pairwise(coarse))


@pytest.mark.parametrize("unit", ["parameters", "bytes", "flops"])
@pytest.mark.parametrize("share", [True, False])
def test_what_is_frozen_counts(unit, share):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)
    )
    model = factorize(model, 8, verbose=False)
    x = torch.randn(64, 64)
    tensors = 3 * (64 + 2 * 64 * 8)
    amount = {"parameters": tensors + 3 * 64, "bytes": 4 * (tensors + 3 * 64)}.get(unit, 0)
    dense = {"parameters": 3 * 64 * 65, "bytes": 12 * 64 * 65}.get(unit, 1)
    if unit == "flops":
        amount, dense = 3 * 64 * (64 + 2 * 64 * 8), 3 * 64 * 64 * 64
    budget = gt.Budget(**{unit: amount / dense if share else amount})
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), lr=0.1), model, budget)
    for _ in range(10):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        model[0].requires_grad_(False)  # after a pass, in which operations are counted
        model[0].core.grad = None
        optimizer.step()
    assert optimizer.ranks["0"] == (8, 8)
    assert {optimizer.ranks["2"], optimizer.ranks["4"]} <= {(r, r) for r in range(6, 11)}
    sizes = sum(layer.point.size for layer in (model[0], model[2], model[4]))
    assert 0.97 * tensors <= sizes <= tensors


def test_what_is_frozen_beyond_its_share_leaves_the_others_theirs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
    model = factorize(model, 20, verbose=False)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), lr=0.1), model, gt.Budget(parameters=0.2))
    model[0].requires_grad_(False)
    x = torch.randn(64, 64)
    for frozen in (True, False):
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
        assert (optimizer.ranks["0"] == (20, 20)) == frozen
        assert model[2].point.size <= 0.2 * 64 * 64 + (not frozen) * 200
        model[0].requires_grad_(True)
    assert model[0].point.size + model[2].point.size <= 0.2 * 2 * 64 * 64


@pytest.mark.parametrize("amid", [False, True])
def test_what_is_frozen_amid_a_step_counts_at_its_own_ranks(amid):
    torch.manual_seed(0)
    layers = TuckerLinear(64, 64, 16, bias=False), nn.Tanh(), TuckerLinear(64, 64, 24, bias=False)
    model, x = nn.Sequential(*layers).double(), torch.randn(64, 64).double()
    budget = gt.Budget(parameters=sum(p.numel() for p in model.parameters()))
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), lr=1e-6), model, budget, basis_every=2)
    if not amid:
        model[0].requires_grad_(False)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        if amid:
            model[0].requires_grad_(False)
            model[0].zero_grad()
        optimizer.step()
        assert optimizer.ranks == {"0": (16, 16), "2": (24, 24)}
    assert optimizer.rank_history["0"] == {0: (16, 16)} | dict.fromkeys((1, 2, 3), (16, 16))


def test_operations_that_nobody_knows_are_said_beside_frozen_tensors():
    model = nn.Sequential(TuckerLinear(32, 32, 8), nn.Linear(32, 32), TuckerLinear(32, 32, 8))
    budget = gt.Budget(flops=0.4)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), lr=0.1), model, budget)
    model[0].requires_grad_(False)
    model[1](model[0](torch.randn(4, 32))).square().sum().backward()
    with pytest.raises(gt.RankError, match="flops: expected the operations of every tensor"):
        optimizer.step()
