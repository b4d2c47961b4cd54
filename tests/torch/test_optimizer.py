"""The optimizer: equal to the core's integrator, at home in torch, all or nothing."""

import copy
import gc
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import geotucker as gt
from geotucker.testing import check_orthonormal
from geotucker_torch import TDLRT, TuckerConv2d, TuckerLinear, factorize, finalize
from geotucker_torch._finite import Verdict, largest_of


def problem(seed=0, bias=True):
    """Return a small network of Tucker layers in float64 and a closure maker."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 25, 12, bias=bias),
        nn.Tanh(),
        nn.Linear(12, 4),
    ).double()
    model = factorize(model, {"0": 3, "3": 4}, verbose=False)
    x, y = torch.randn(16, 3, 5, 5).double(), torch.randint(0, 4, (16,))

    def closure_for(optimizer):
        def closure():
            closure.calls += 1
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        closure.calls = 0
        return closure

    return model, closure_for


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def assert_same(a, b):
    """Assert that nested containers of tensors and numbers are equal to the bit."""
    assert type(a) is type(b)
    if torch.is_tensor(a):
        assert a.shape == b.shape and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("name", "momentum", "one_pass"),
    # With momentum the core extends its bases by gradient and moment, the layers by their sum,
    # which makes no difference to a step in the tangent space.
    [("tangent", 0.0, True), ("tangent", 0.9, True), ("tdlrt", 0.0, True), ("tdlrt", 0.0, False)],
)
@pytest.mark.parametrize("rule", [gt.Fixed(3), gt.Tolerance(0.1), gt.Tolerance(1e-3)])
def test_equals_the_integrator_of_the_core(rule, name, momentum, one_pass):
    torch.manual_seed(1)
    layer = TuckerLinear(9, 7, 3, bias=False).double()
    x, target = torch.randn(20, 9).double(), torch.randn(20, 7).double()

    def objective(point):
        weight = gt.to_dense(point).detach().requires_grad_()
        loss = nn.functional.mse_loss(x @ weight.T, target)
        (gradient,) = torch.autograd.grad(loss, weight)
        return loss.item(), gradient

    scheme = gt.HeavyBall(momentum) if momentum else gt.Euler()
    integrator = {"tdlrt": gt.TDLRT, "tangent": gt.Tangent}[name](0.3, scheme)
    point = gt.orthonormalise(layer.point)  # drawn in single precision
    state = integrator.init(point)
    sgd = torch.optim.SGD(layer.parameters(), 0.3, momentum)
    optimizer = TDLRT(sgd, layer, rule, integrator=name, one_pass=one_pass)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        return loss

    for _ in range(10):
        loss = optimizer.step(closure)
        point, state, report = integrator.step(point, objective, state, rule)
        assert loss.item() == pytest.approx(report.loss, rel=1e-10)
        assert layer.ranks == point.ranks
        torch.testing.assert_close(layer.dense_weight(), gt.to_dense(point), rtol=0, atol=1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
def test_full_ranks_train_as_the_dense_layer(decay, nesterov):
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 4, 2).double()
    layer = TuckerConv2d.from_dense(dense, (4, 3, 2, 2))
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": decay, "nesterov": nesterov}
    reference = torch.optim.SGD(dense.parameters(), **settings)
    optimizer = TDLRT(torch.optim.SGD(layer.parameters(), **settings), layer)
    x = torch.randn(6, 3, 4, 4).double()

    def run(module, opt):
        def closure():
            opt.zero_grad()
            loss = (module(x) ** 4).mean()
            loss.backward()
            return loss

        return opt.step(closure)

    for _ in range(20):
        run(dense, reference)
        run(layer, optimizer)
    torch.testing.assert_close(layer.dense_weight(), dense.weight, rtol=0, atol=1e-11)
    torch.testing.assert_close(layer.bias, dense.bias, rtol=0, atol=1e-11)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, 1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, 1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, 1e-1),
    "Rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
}


@pytest.mark.parametrize("rule", [gt.Tolerance(0.05), None], ids=["tolerance", "fixed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_wraps_any_optimizer(name, rule):
    model, closure_for = problem()
    optimizer = TDLRT(OPTIMIZERS[name](model.parameters()), model, rule)
    closure = closure_for(optimizer)
    losses = [optimizer.step(closure).item() for _ in range(15)]
    assert min(losses[5:]) < losses[0]
    for layer in (model[0], model[3]):
        check_orthonormal(layer.point)
        for value in optimizer.state[layer.core].values():
            if torch.is_tensor(value) and value.dim() == layer.core.dim():
                assert value.shape == layer.core.shape
        assert all(factor not in optimizer.state for factor in layer.factors)


def test_second_moments_stay_nonnegative():
    model, closure_for = problem()
    optimizer = TDLRT(torch.optim.Adam(model.parameters(), 1e-2), model, gt.Tolerance(0.2))
    closure = closure_for(optimizer)
    for _ in range(10):
        optimizer.step(closure)
        assert all(float(s["exp_avg_sq"].min()) >= 0 for s in optimizer.state.values())


def test_factors_are_neither_stepped_nor_decayed_nor_left_with_gradients():
    model, closure_for = problem()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=0.5)
    optimizer = TDLRT(sgd, model)
    before = model[3].dense_weight()
    optimizer.step(closure_for(optimizer))
    torch.testing.assert_close(model[3].dense_weight(), before, rtol=0, atol=1e-12)
    for factor in model[3].factors:
        assert factor.grad is None and not factor.requires_grad and factor not in sgd.state


def test_factors_trainable_before_stay_trainable():
    model, closure_for = problem()
    model.requires_grad_(True)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5), model)
    optimizer.step(closure_for(optimizer))
    assert all(factor.requires_grad for factor in model[3].factors)
    check_orthonormal(model[3].point)


@pytest.mark.parametrize("one_pass", [True, False])
def test_only_two_passes_call_the_closure_twice_and_only_to_extend_the_bases(one_pass):
    model, closure_for = problem()
    sgd = torch.optim.SGD(model.parameters(), 0.05)
    optimizer = TDLRT(sgd, model, gt.Fixed(3), basis_every=3, one_pass=one_pass)
    closure = closure_for(optimizer)
    calls, ranks = [], []
    for _ in range(6):
        before = closure.calls
        optimizer.step(closure)
        calls.append(closure.calls - before)
        ranks.append(optimizer.ranks["3"])
    assert calls == [1, 1, 1, 1, 1, 1] if one_pass else [2, 1, 1, 2, 1, 1]
    assert ranks == [(3, 3)] * 6


def test_the_second_pass_starts_from_no_gradient_even_if_the_closure_forgets():
    model, _ = problem()
    twin = copy.deepcopy(model)
    results = []
    for network, forget in ((model, False), (twin, True)):
        sgd = torch.optim.SGD(network.parameters(), 0.1)
        optimizer = TDLRT(sgd, network, one_pass=False)
        x = torch.ones(2, 3, 5, 5).double()

        def closure(opt=optimizer, net=network, skip=forget):
            if not skip:
                opt.zero_grad()
            loss = (net(x) ** 2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        results.append(network.state_dict())
    assert_same(*results)


def test_ranks_by_pattern_and_ranks_that_stay():
    model, closure_for = problem()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = TDLRT(sgd, model, {"0": gt.Fixed((2, 2, 2, 2))})
    optimizer.step(closure_for(optimizer))
    assert optimizer.ranks == {"0": (2, 2, 2, 2), "3": (4, 4)}


def test_frozen_and_unused_layers_keep_their_weight():
    model, closure_for = problem()
    model[0].core.requires_grad_(False)
    unused = TuckerLinear(6, 5, 2).double()
    both = nn.ModuleList([model, unused])
    optimizer = TDLRT(torch.optim.SGD(both.parameters(), 0.1), both)
    frozen, idle = (layer.dense_weight().detach() for layer in (model[0], unused))
    optimizer.step(closure_for(optimizer))
    assert torch.equal(model[0].dense_weight(), frozen)
    torch.testing.assert_close(unused.dense_weight().detach(), idle)
    model[0].core.requires_grad_(True)
    optimizer.step(closure_for(optimizer))
    assert not torch.allclose(model[0].dense_weight(), frozen)


def test_a_layer_used_twice_is_one_tensor():
    layer = TuckerLinear(6, 6, 2).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.1), model)
    assert list(optimizer.ranks) == ["0"]
    x = torch.randn(4, 6).double()

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    for _ in range(20):
        last = optimizer.step(closure).item()
    assert last < first


def test_schedulers_and_param_groups():
    model, closure_for = problem()
    sgd = torch.optim.SGD([{"params": model[:3].parameters(), "lr": 1.0},
                           {"params": model[3:].parameters()}], lr=0.1)  # fmt: skip
    optimizer = TDLRT(sgd, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(closure_for(optimizer))
    scheduler.step()
    assert [group["lr"] for group in sgd.param_groups] == [0.5, 0.05]
    assert optimizer.param_groups is sgd.param_groups and optimizer.state is sgd.state
    extra = nn.Parameter(torch.zeros(1))
    optimizer.add_param_group({"params": [extra], "lr": 7.0})
    assert sgd.param_groups[-1]["params"] == [extra]
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    optimizer.step(closure_for(optimizer))
    cycle.step()


def test_step_hooks_run():
    model, closure_for = problem()
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.1), model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step(closure_for(optimizer))
    assert seen == ["before", "after"]


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("rule", [None, gt.Tolerance(0.05)], ids=["kept", "tolerance"])
def test_resume_is_bit_identical(every, rule, tmp_path):
    def build():
        model, closure_for = problem()
        adam = torch.optim.Adam(model.parameters(), 1e-2)
        optimizer = TDLRT(adam, model, rule, basis_every=every)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3), closure_for

    def advance(model, optimizer, scheduler, closure_for, steps):
        closure = closure_for(optimizer)
        for _ in range(steps):
            optimizer.step(closure)
            scheduler.step()

    unbroken = build()
    advance(*unbroken, 13)
    first = build()
    advance(*first, 6)
    path = tmp_path / "checkpoint.pt"
    torch.save([part.state_dict() for part in first[:3]], path)
    second = build()
    for part, state in zip(second[:3], torch.load(path, weights_only=True), strict=True):
        part.load_state_dict(state)
    advance(*second, 7)
    assert_same(snapshot(*unbroken[:2]), snapshot(*second[:2]))


def test_copies_and_pickles_go_on_alike():
    model, closure_for = problem()
    optimizer = TDLRT(torch.optim.Adam(model.parameters(), 1e-2), model)
    optimizer.step(closure_for(optimizer))
    for twin, net in (
        copy.deepcopy((optimizer, model)),
        pickle.loads(pickle.dumps((optimizer, model))),
    ):
        assert_same(snapshot(model, optimizer), snapshot(net, twin))
        assert twin.param_groups[0]["params"][0] is next(net.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_run_that_is_copied_between_backward_and_step_goes_on_alike(copied):
    model, closure_for = problem()
    optimizer = TDLRT(torch.optim.Adam(model.parameters(), 1e-2), model)
    optimizer.step(closure_for(optimizer))
    closure_for(optimizer)()
    twin, net = copied((optimizer, model))
    wide = model[0].core.shape
    x, y = torch.randn(16, 3, 5, 5).double(), torch.randint(0, 4, (16,))
    for own, parts in ((optimizer, model), (twin, net)):
        assert parts[0].core.shape == wide
        assert parts[0].settled_ranks == (3, 3, 3, 3)
        for parameter in net.parameters():  # gradients are not copied
            parameter.grad = None if parts is net else parameter.grad
        own.zero_grad()
        assert parts[0].ranks == (3, 3, 3, 3)
        nn.functional.cross_entropy(parts(x), y).backward()
        assert parts[0].core.shape == wide
        own.step()
    assert_same(snapshot(model, optimizer), snapshot(net, twin))
    assert net[0].armed
    del own, twin
    gc.collect()
    assert not net[0].armed


def lifted_problem():
    model, closure_for = problem()
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 1e-2), model)
    closure_for(optimizer)()
    assert all(layer.core.shape != layer.settled_ranks for layer in (model[0], model[3]))
    return model, optimizer, torch.randn(16, 3, 5, 5).double()


def test_a_core_that_is_replaced_amid_a_step_is_the_one_that_counts():
    model, optimizer, x = lifted_problem()
    expected = model[0].dense_weight().detach() * 2
    model[0].core = nn.Parameter(model[0].core.detach() * 2)
    torch.testing.assert_close(model[0].dense_weight(), expected)
    torch.testing.assert_close(finalize(model)(x), model(x))
    own = {name: (p.detach() * 1.5).requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, own, (x,)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in own.values())
    assert optimizer.param_groups


@pytest.mark.parametrize("converted", [copy.deepcopy, lambda model: model])
def test_a_model_that_is_converted_amid_a_step(converted):
    model, optimizer, x = lifted_problem()
    expected = model(x).detach()
    net = converted(model).float()
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(net(x.float()).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(finalize(net)(x.float()), net(x.float()))
    optimizer.zero_grad()
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    torch.testing.assert_close(net(x.float()).double(), expected, rtol=1e-4, atol=1e-5)


def test_copies_in_inference_mode():
    model, optimizer, x = lifted_problem()
    with torch.inference_mode():
        twin = copy.deepcopy(copy.deepcopy(model))
        torch.testing.assert_close(twin(x), model(x))
        torch.testing.assert_close(finalize(twin)(x), model(x))
        assert twin.state_dict().keys() == model.state_dict().keys()
    assert optimizer.param_groups


def test_values_behind_autograds_back_count_without_the_optimizer():
    model, optimizer, x = lifted_problem()
    twin = copy.deepcopy(model)
    del optimizer
    gc.collect()
    for net in (model, twin):
        before = net(x).detach()
        for parameter in net.parameters():
            parameter.data.mul_(1.1)
        assert not torch.allclose(net(x), before)
        torch.testing.assert_close(finalize(net)(x), net(x))
        fresh = copy.deepcopy(net)
        fresh.load_state_dict(net.state_dict())
        torch.testing.assert_close(fresh(x), net(x))


def test_a_new_optimizer_amid_a_step_begins_at_the_settled_ranks():
    model, old, x = lifted_problem()
    weights = [layer.dense_weight().detach().clone() for layer in (model[0], model[3])]
    ranks = [layer.settled_ranks for layer in (model[0], model[3])]
    with pytest.raises(gt.RankError):
        TDLRT(torch.optim.SGD(model.parameters(), 1e-2), model, "3")
    assert model[0].core.shape != ranks[0]  # nothing is changed
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 1e-2), model)
    del old
    assert list(optimizer.ranks.values()) == ranks
    for layer, weight in zip((model[0], model[3]), weights, strict=True):
        torch.testing.assert_close(layer.dense_weight(), weight)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    assert list(optimizer.ranks.values()) == ranks


def test_loading_its_own_state_amid_a_step():
    model, optimizer, x = lifted_problem()
    optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        model(x).square().mean().backward()
    optimizer.step()
    assert model[0].core.shape == model[0].settled_ranks == (3, 3, 3, 3)


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_without_its_optimizer_extends_nothing(copied, lifted):
    model, closure_for = problem()
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 1e-2), model)
    optimizer.step(closure_for(optimizer))
    if lifted:
        closure_for(optimizer)()
    net = copied(model).requires_grad_(True)
    sgd = torch.optim.SGD(net.parameters(), 1e-2, momentum=0.9)
    x, y = torch.randn(16, 3, 5, 5).double(), torch.randint(0, 4, (16,))
    shapes, losses = [p.shape for p in net.parameters()], []
    for _ in range(3):
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        sgd.step()
        losses.append(loss.item())
        # Nothing of the point before the lift comes back.
        weight = gt.to_dense(gt.TuckerPoint(net[3].core.detach(), net[3].point.factors))
        assert torch.equal(net.state_dict()["3.core"], net[3].core)
        torch.testing.assert_close(finalize(net)(x), net(x))
        torch.testing.assert_close(net[3].dense_weight(), weight)
    assert [p.shape for p in net.parameters()] == shapes
    assert losses[2] < losses[0]
    optimizer.step(closure_for(optimizer))  # and the original goes on as ever
    assert model[0].ranks == (3, 3, 3, 3)


def test_a_shallow_copy_leaves_the_layers_to_the_original():
    model, closure_for = problem()
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 1e-2), model)
    twin = copy.copy(optimizer)
    del twin
    gc.collect()
    assert model[0].armed
    closure_for(optimizer)()
    assert model[0].ranks == (6, 3, 3, 3)  # of three channels, and three by three


def test_a_copy_steps_itself_with_a_scheduler_too():
    model, closure_for = problem()
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 1e-2), model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps optimizer.step
    optimizer.step(closure_for(optimizer))
    before = snapshot(model, optimizer)
    twin, net = copy.deepcopy((optimizer, model))
    nn.functional.mse_loss(net(torch.randn(2, 3, 5, 5).double()), torch.zeros(2, 4)).backward()
    twin.step()
    assert_same(snapshot(model, optimizer), before)
    assert twin.state_dict()["tdlrt"]["steps"] == 2
    scheduler.step()


@pytest.mark.parametrize("top", [False, True])
def test_a_model_that_holds_its_optimizer_is_copied(top):
    layer = TuckerLinear(12, 8, ranks=3)
    model = layer if top else nn.Sequential(layer)
    model.optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.1), model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.optimizer.param_groups[0]["params"][0] is next(twin.parameters())
        for _ in range(2):
            twin.optimizer.zero_grad()
            twin(torch.randn(5, 12)).square().sum().backward()
            twin.optimizer.step()
        assert twin.optimizer.ranks == model.optimizer.ranks


def test_a_state_without_the_gauge_of_its_moments_is_refused():
    model, closure_for = problem()
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9), model)
    optimizer.step(closure_for(optimizer))
    before, state = snapshot(model, optimizer), copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry.get("tangent", {}).pop("right", None)
    state["tdlrt"]["steps"] = 7
    with pytest.raises(ValueError, match="expected 'right' beside the basis parts"):
        optimizer.load_state_dict(state)
    assert_same(snapshot(model, optimizer), before)


class Broken(torch.optim.SGD):
    """Raises after it has moved the parameters."""

    broken = False

    def step(self, closure=None):
        super().step()
        if self.broken:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("fault", ["first pass", "second pass", "nan", "inf late", "step", "rate"])
def test_a_failed_step_changes_nothing(fault, every, one_pass):
    model, closure_for = problem()
    wrapped = Broken(model.parameters(), 0.1, momentum=0.9)
    optimizer = TDLRT(wrapped, model, gt.Tolerance(0.05), basis_every=every, one_pass=one_pass)
    good = closure_for(optimizer)
    for _ in range(every):
        optimizer.step(good)
    before, calls = snapshot(model, optimizer), good.calls

    def bad():
        loss = good()
        second = good.calls == calls + 2 - one_pass
        if fault == "first pass" or (fault == "second pass" and second):
            raise KeyError("data")
        if fault == "nan":
            model[5].weight.grad[0, 0] = float("nan")
        if fault == "inf late" and second:
            model[3].core.grad[0, 0] = float("inf")
        return loss

    wrapped.broken = fault == "step"
    rate = optimizer.param_groups[0]["lr"]
    if fault == "rate":
        optimizer.param_groups[0]["lr"] = float("inf")
        before = snapshot(model, optimizer)
    with pytest.raises((KeyError, RuntimeError, gt.NonFiniteError)):
        optimizer.step(bad)
    assert_same(snapshot(model, optimizer), before)
    wrapped.broken = False
    optimizer.param_groups[0]["lr"] = rate
    assert np.isfinite(optimizer.step(good).item())


class Listing(torch.optim.SGD):
    """Keeps tensors in lists, which it writes in place, and new ones in a dict."""

    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                for total in state.setdefault("totals", [torch.zeros(()), torch.zeros(2)]):
                    total.add_(parameter.grad.sum())
                state["last"] = {"sum": parameter.grad.sum()}


CHECKED_LATE = {
    "lists": lambda p: Listing(p, 0.05),
    "SGD": lambda p: torch.optim.SGD(p, 0.05, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "fused momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


def checked_late(make_optimizer, late_check=True):
    model, closure_for = problem()
    optimizer = TDLRT(
        make_optimizer(model.parameters()),
        model,
        gt.Tolerance(0.05),
        basis_every=5,
        late_check=late_check,
    )
    return model, optimizer, closure_for(optimizer)


def advance(optimizer, closure, steps):
    for _ in range(steps):
        closure()
        optimizer.step()


@pytest.mark.parametrize("kind", CHECKED_LATE)
@pytest.mark.parametrize("fault", ["nan", "inf", "rate"])
def test_a_step_that_is_checked_late_changes_nothing_either(kind, fault):
    model, optimizer, closure = checked_late(CHECKED_LATE[kind])
    advance(optimizer, closure, 2)
    before = snapshot(model, optimizer)
    closure()
    rates = [group["lr"] for group in optimizer.param_groups]
    if fault == "rate":
        optimizer.param_groups[0]["lr"] = float("inf")
    else:
        model[5].weight.grad[0, 0] = float(fault)
    optimizer.step()  # nobody is told yet
    optimizer.param_groups[0]["lr"] = rates[0]
    after = snapshot(model, optimizer)
    assert after[1].pop("tdlrt")["steps"] == before[1].pop("tdlrt")["steps"] + 1
    assert_same(after, before)
    closure()
    with pytest.raises(gt.NonFiniteError, match="in the step before"):
        optimizer.step()
    again = snapshot(model, optimizer)
    assert again[1].pop("tdlrt")["steps"] == 3
    assert_same(again, before)
    optimizer.step()  # the gradients are still there
    assert optimizer.state_dict()["tdlrt"]["steps"] == 4
    assert not torch.equal(model[3].core, before[0]["3.core"])
    advance(optimizer, closure, 4)  # and bases move again
    check_orthonormal(model[3].point)


REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHER = (torch.int64, torch.bool, torch.complex64, torch.complex128)


@given(finite=st.booleans(), numbers=st.lists(st.floats(width=32), min_size=1))
@pytest.mark.parametrize("dtype", [*REAL, *OTHER])
def test_a_verdict_takes_all_back_or_nothing(dtype, finite, numbers):
    values = torch.tensor(numbers)
    if not dtype.is_floating_point:
        values = values.nan_to_num()
    now, before = values.to(dtype), values.flip(0).to(dtype)
    expected = (now if finite else before).clone()
    Verdict(largest_of([("it", torch.tensor(1.0 if finite else math.inf))]), [(now, before)])
    bits = [t.view(torch.uint8) for t in (now, expected)]
    assert torch.equal(*bits)


@pytest.mark.parametrize("kind", CHECKED_LATE)
def test_a_late_check_changes_no_finite_step(kind):
    ends = []
    for late_check in (False, True):
        model, optimizer, closure = checked_late(CHECKED_LATE[kind], late_check)
        advance(optimizer, closure, 8)
        ends.append(snapshot(model, optimizer))
    assert_same(*ends)


class Counting(torch.optim.SGD):
    """Keeps a number beside its tensors, as some optimizers do."""

    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["calls"] = state.get("calls", 0) + 1


class Estimating(torch.optim.SGD):
    """Keeps what it learns in the parameter group, as Prodigy does."""

    def step(self, closure=None):
        super().step()
        group = self.param_groups[0]
        gradients = [p.grad.abs().sum().item() for p in group["params"] if p.grad is not None]
        group["learnt"] = {"sum": sum(gradients)}


AT_ONCE = {
    "numbers": lambda p: Counting(p, 0.05),
    "a parameter group": lambda p: Estimating(p, 0.05),
    "shared memory": lambda p: torch.optim.SGD(p, 0.05),
}


@pytest.mark.parametrize("kind", AT_ONCE)
def test_a_step_is_checked_at_once_where_tensors_alone_are_no_way_back(kind):
    model, optimizer, closure = checked_late(AT_ONCE[kind])
    if kind == "shared memory":
        model[5].bias.data = model[5].weight.data[:, 0]
    advance(optimizer, closure, 2)
    before = snapshot(model, optimizer)
    closure()
    model[5].weight.grad[0, 0] = float("nan")
    with pytest.raises(gt.NonFiniteError, match="undone"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("late_check", [False, True])
def test_what_was_frozen_after_its_gradient_came_is_put_back(late_check):
    model, optimizer, closure = checked_late(CHECKED_LATE["SGD"], late_check)
    closure()
    optimizer.step()
    before = snapshot(model, optimizer)[0]
    closure()
    model[5].weight.grad[0, 0] = float("nan")
    model[5].weight.requires_grad_(False)
    if late_check:
        optimizer.step()
    with pytest.raises(gt.NonFiniteError):
        optimizer.step()
    assert_same(snapshot(model, optimizer)[0], before)


def test_a_learning_rate_stays_the_tensor_that_a_scheduler_writes():
    rate = torch.tensor(0.05)
    model, optimizer, closure = checked_late(lambda p: torch.optim.Adam(p, rate))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer.wrapped, 0.5)
    advance(optimizer, closure, 2)
    closure()
    model[5].weight.grad[0, 0] = float("nan")
    optimizer.step()
    scheduler.step()
    with pytest.raises(gt.NonFiniteError, match="in the step before"):
        optimizer.step()
    optimizer.late_check = False
    with pytest.raises(gt.NonFiniteError, match="undone"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] is scheduler.optimizer.param_groups[0]["lr"]
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)


def test_a_copy_holds_nothing_of_a_step_that_was_not_finite(monkeypatch):
    model, optimizer, closure = checked_late(CHECKED_LATE["Adam"])
    advance(optimizer, closure, 2)
    before = snapshot(model, optimizer)[1]["state"]
    elsewhere = []
    init = Verdict.__init__

    def with_counters_elsewhere(self, largest, changes):  # as those of a GPU's parameters are
        counters = [pair for pair in changes if pair[0].dim() == 0]
        init(self, largest, [pair for pair in changes if pair[0].dim()])
        self._elsewhere = counters
        elsewhere.extend(counters)

    monkeypatch.setattr(Verdict, "__init__", with_counters_elsewhere)
    closure()
    model[5].weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert elsewhere
    assert_same(copy.deepcopy(optimizer).state_dict()["state"], before)


def test_a_loaded_state_has_no_step_before():
    model, optimizer, closure = checked_late(CHECKED_LATE["momentum"])
    advance(optimizer, closure, 2)
    saved = snapshot(model, optimizer)
    closure()
    model[5].weight.grad[0, 0] = float("nan")
    optimizer.step()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    closure()
    optimizer.step()


def test_non_orthonormal_factors_are_orthonormalised_without_moving_the_weight():
    model, _ = problem()
    with torch.no_grad():
        model[3].factors[0].mul_(3.0)
    before = model[3].dense_weight()
    TDLRT(torch.optim.SGD(model.parameters(), 0.1), model)
    check_orthonormal(model[3].point)
    torch.testing.assert_close(model[3].dense_weight(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    model, _ = problem()
    model = model.to(dtype)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.05), model, gt.Tolerance(0.1))
    x = torch.randn(8, 3, 5, 5, dtype=dtype)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert model[3].core.dtype == dtype


def test_wrong_arguments():
    model, _ = problem()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer"):
        TDLRT(model, model)
    with pytest.raises(TypeError, match="LBFGS cannot be wrapped"):
        TDLRT(torch.optim.LBFGS(model.parameters()), model)
    with pytest.raises(ValueError, match="basis_every: expected a positive integer, got 0"):
        TDLRT(sgd, model, basis_every=0)
    for power in (-0.1, 1.5, float("nan"), True, "1/4"):
        with pytest.raises(ValueError, match="rate_power: expected a number from 0 to 1, got"):
            TDLRT(sgd, model, rate_power=power)
    with pytest.raises(ValueError, match="call factorize"):
        TDLRT(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), nn.Linear(2, 2))
    with pytest.raises(gt.RankError, match="pattern 'conv' names none of 0, 3"):
        TDLRT(sgd, model, {"conv": 3})
    with pytest.raises(gt.RankError, match="expected a rank rule"):
        TDLRT(sgd, model, "3")
    optimizer = TDLRT(sgd, model)
    with pytest.raises(TypeError, match="TDLRT cannot be wrapped"):
        TDLRT(optimizer, model)
    with pytest.raises(TypeError, match=r"closure: expected a function .* 0, 3 are extended"):
        TDLRT(sgd, model, one_pass=False).step()
    assert_same(model.state_dict(), before)


def test_loading_a_wrong_state_changes_nothing():
    model, closure_for = problem()
    optimizer = TDLRT(torch.optim.Adam(model.parameters(), 1e-2), model)
    optimizer.step(closure_for(optimizer))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="expected an entry 'tdlrt'"):
        optimizer.load_state_dict(optimizer.wrapped.state_dict())
    other = copy.deepcopy(before)
    other["tdlrt"]["ranks"] = {"x": (1, 1)}
    with pytest.raises(ValueError, match="expected the Tucker tensors"):
        optimizer.load_state_dict(other)
    other = copy.deepcopy(before)
    other["tdlrt"]["ranks"]["3"] = (2, 2)
    with pytest.raises(ValueError, match=r"expected ranks \(4, 4\) of '3'.* got \(2, 2\)"):
        optimizer.load_state_dict(other)
    for entry in before["tdlrt"]:
        other = copy.deepcopy(before)
        del other["tdlrt"][entry]
        with pytest.raises(ValueError, match=f"what TDLRT.state_dict returns, got .*{entry}"):
            optimizer.load_state_dict(other)
    other = copy.deepcopy(before)
    other["param_groups"][0]["params"].append(99)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(other)
    other = copy.deepcopy(before)
    other["state"][0]["exp_avg"] = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="load the model's state_dict"):
        optimizer.load_state_dict(other)
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("part", ["core", "factors", "named"])
def test_groups_with_tensors_whose_bases_would_not_move_are_refused(part):
    model = nn.Sequential(TuckerLinear(8, 6, 2), nn.Linear(6, 6), TuckerLinear(6, 4, 2))
    optimizer = TDLRT(torch.optim.SGD(model[2].parameters(), lr=0.1), model)
    given = {
        "core": model[0].core,
        "factors": iter(model[0].factors),
        "named": list(model[0].named_parameters()),
    }[part]
    with pytest.raises(ValueError, match="param_group: expected no parameters of '0'"):
        optimizer.add_param_group({"params": given})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.5})
    assert optimizer.param_groups[1]["params"] == list(model[1].parameters())


def test_hooks_on_states_are_the_wrapped_optimizers():
    model, _ = problem()
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), lr=0.1), model)
    called = []
    optimizer.register_state_dict_pre_hook(lambda one: called.append("before"))
    optimizer.register_state_dict_post_hook(lambda one, state: called.append("after"))
    optimizer.register_load_state_dict_pre_hook(lambda one, state: called.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda one: called.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["before", "after", "loading", "loaded"]
