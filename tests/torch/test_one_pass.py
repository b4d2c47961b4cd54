"""One pass is exact: equal to two passes, and at home in ordinary training loops."""

import copy
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import geotucker as gt
from geotucker import _ops
from geotucker._geometry import right_bases
from geotucker.testing import check_orthonormal
from geotucker_torch import (
    TDLRT,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerLinear,
    factorize,
)

from .cases import sgd, trained


def assert_one_pass_is_two(layer, x, **settings):
    one = trained(layer, x, one_pass=True, **settings)
    two = trained(layer, x, one_pass=False, **settings)
    assert one.ranks == two.ranks
    torch.testing.assert_close(one.dense_weight(), two.dense_weight(), rtol=0, atol=1e-12)
    if layer.bias is not None:
        torch.testing.assert_close(one.bias, two.bias, rtol=0, atol=1e-12)


RULES = st.sampled_from([None, gt.Tolerance(0.1), gt.Fixed(2)])


@given(
    features=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.integers(1, 9),
    lead=st.sampled_from([(), (4,), (2, 3)]),
    bias=st.booleans(),
    rule=RULES,
)
def test_linear(features, ranks, lead, bias, rule):
    torch.manual_seed(0)
    layer = TuckerLinear(*features, ranks, bias).double()
    assert_one_pass_is_two(layer, torch.randn(*lead, features[0]).double(), rule=rule)


@given(
    kind=st.sampled_from([TuckerConv1d, TuckerConv2d, TuckerConv3d]),
    groups=st.sampled_from([1, 2, 4]),
    ranks=st.integers(1, 8),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    dilation=st.integers(1, 2),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    batched=st.booleans(),
    bias=st.booleans(),
    rule=RULES,
)
def test_convolution(
    kind, groups, ranks, kernel, stride, padding, dilation, padding_mode, batched, bias, rule
):
    torch.manual_seed(0)
    order = {TuckerConv1d: 1, TuckerConv2d: 2, TuckerConv3d: 3}[kind]
    layer = kind(
        4, 8, kernel, ranks, 1 if padding == "same" else stride, padding, dilation, groups, bias,
        padding_mode,
    ).double()  # fmt: skip
    x = torch.randn(*((2,) if batched else ()), 4, *range(6, 6 + order)).double()
    assert_one_pass_is_two(layer, x, rule=rule, number=2)


def test_a_network_with_batch_norm_and_dropout_sees_one_pass():
    torch.manual_seed(0)
    model = nn.Sequential(
        TuckerConv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Flatten(),
        TuckerLinear(54, 4, 2),
    )  # fmt: skip
    optimizer = TDLRT(sgd(model), model)
    state = torch.get_rng_state()
    model(torch.randn(2, 3, 5, 5))
    torch.set_rng_state(state)
    model[1].reset_running_stats()
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    assert int(model[1].num_batches_tracked) == 1


def test_a_layer_used_twice_in_one_graph():
    torch.manual_seed(0)
    layer = TuckerLinear(6, 6, 2).double()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = copy.deepcopy(layer)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    model, x = Twice(), torch.randn(5, 6).double()
    dense = layer.dense_weight().detach().requires_grad_()
    bias = layer.bias.detach()
    hidden = torch.tanh(nn.functional.linear(x, dense, bias))
    nn.functional.linear(hidden, dense, bias).square().sum().backward()
    optimizer = TDLRT(sgd(model), model, integrator="tdlrt")
    assert list(optimizer.ranks) == ["layer"]
    model(x).square().sum().backward()
    bases = [factor.detach() for factor in model.layer.factors]
    assert model.layer.ranks == (4, 4)
    expected = bases[0].T @ dense.grad @ bases[1]
    torch.testing.assert_close(model.layer.core.grad, expected, rtol=0, atol=1e-12)


def data(seed=0):
    torch.manual_seed(seed)
    model = factorize(
        nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 14)), 3, verbose=False
    ).double()
    return model, torch.randn(12, 10).double(), torch.randn(12, 14).double()


def test_micro_batches_add_up_in_the_bases_of_the_first():
    model, x, y = data()
    optimizer = TDLRT(sgd(model), model)
    for part in (slice(0, 4), slice(4, 12)):
        loss = (model(x[part]) - y[part]).square().sum()
        loss.backward()
    assert optimizer.ranks == {"0": (6, 6), "2": (6, 6)}
    joined = [copy.deepcopy(layer.core.grad) for layer in (model[0], model[2])]
    for layer in (model[0], model[2]):
        layer.core.grad.zero_()
    (model(x) - y).square().sum().backward()  # the whole batch in the same wide bases
    for layer, grad in zip((model[0], model[2]), joined, strict=True):
        torch.testing.assert_close(layer.core.grad, grad, rtol=0, atol=1e-12)
    optimizer.step()
    assert optimizer.ranks == {"0": (3, 3), "2": (3, 3)}


def test_equal_micro_batches_are_one_batch():
    whole, x, y = data()
    parts = copy.deepcopy(whole)
    for model, number in ((whole, 1), (parts, 4)):
        optimizer = TDLRT(sgd(model), model, gt.Tolerance(0.1))
        for _ in range(number):
            ((model(x) - y).square().mean() / number).backward()
        optimizer.step()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_norm_that_is_clipped_is_that_of_the_projected_gradient():
    model, x, y = data()
    optimizer = TDLRT(sgd(model), model)
    assert optimizer.ranks == {"0": (3, 3), "2": (3, 3)}
    (model(x) - y).square().sum().backward()
    total = sum(
        parameter.grad.square().sum()
        for layer in (model[0], model[2])
        for parameter in (layer.core, layer.bias)
    ).sqrt()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.testing.assert_close(norm, total)
    assert all(factor.grad is None for layer in (model[0], model[2]) for factor in layer.factors)
    clipped = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.5).double(), rtol=1e-4, atol=0)


def test_zero_grad_without_a_step_takes_the_padding_away():
    model, x, y = data()
    optimizer = TDLRT(sgd(model), model)
    before = copy.deepcopy(model.state_dict())
    (model(x) - y).square().sum().backward()
    assert optimizer.ranks["0"] == (6, 6)
    optimizer.zero_grad()
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    (model(x) - y).square().sum().backward()
    assert optimizer.ranks["0"] == (6, 6)  # armed again


def test_a_graph_made_after_a_lift_can_be_used_when_that_is_taken_back():
    model, x, y = data()
    optimizer = TDLRT(sgd(model), model)
    (model(x) - y).square().sum().backward()
    gradient = model[0].core.grad.clone()
    late = (model(x) - y).square().sum()
    optimizer.zero_grad()
    assert optimizer.ranks["0"] == (3, 3)
    late.backward()
    torch.testing.assert_close(model[0].core.grad, gradient)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_lifts_nothing(bad):
    model, x, y = data()
    optimizer = TDLRT(sgd(model), model)
    before = copy.deepcopy(model.state_dict())
    ((model(x) - y).square().sum() * bad).backward()
    assert optimizer.ranks == {"0": (3, 3), "2": (3, 3)}
    assert not torch.isfinite(model[0].core.grad).all()
    (model(x) - y).square().sum().backward()  # a good micro-batch after it does not hide it
    assert not torch.isfinite(model[0].core.grad).all()
    with pytest.raises(gt.NonFiniteError, match="expected finite numbers"):
        optimizer.step()
    optimizer.zero_grad()
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    (model(x) - y).square().sum().backward()
    optimizer.step()
    check_orthonormal(model[0].point)


def test_grad_scaler_skips_a_step_that_overflows_and_takes_the_others():
    model, x, y = data()
    model, x, y = model.float(), x.float(), y.float()
    optimizer = TDLRT(sgd(model, lr=0.01), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1000)
    weights = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = 100 * (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        weights.append(model[0].dense_weight().detach().clone())
    assert scaler.get_scale() < 2.0**126  # it has skipped
    assert torch.isfinite(weights[-1]).all()
    assert not torch.allclose(weights[-1], weights[-2], atol=1e-6)
    check_orthonormal(model[0].point)


def test_a_failed_step_keeps_gradients_and_lift():
    model, x, y = data()
    optimizer = TDLRT(sgd(model), model, gt.Tolerance(0.1))
    (model(x) - y).square().sum().backward()
    model[2].bias.grad[0] = float("nan")
    lifted = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradient = model[0].core.grad.clone()
    with pytest.raises(gt.NonFiniteError):
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(lifted[key], after[key]) for key in lifted)
    assert torch.equal(model[0].core.grad, gradient)
    model[2].bias.grad[0] = 0.0
    optimizer.step()


def test_the_first_layer_needs_no_input_gradient_and_the_graph_can_be_kept():
    model, x, y = data()
    optimizer = TDLRT(sgd(model), model)
    assert optimizer.one_pass
    loss = (model(x) - y).square().sum()
    loss.backward(retain_graph=True)
    once = model[0].core.grad.clone()
    loss.backward()
    torch.testing.assert_close(model[0].core.grad, 2 * once)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    plain, x, y = data()
    saved = copy.deepcopy(plain)
    x.requires_grad_(reentrant)  # the reentrant form needs it
    gradients = []
    for model, forward in (
        (plain, lambda net: net(x)),
        (saved, lambda net: checkpoint(net, x, use_reentrant=reentrant)),
    ):
        optimizer = TDLRT(sgd(model), model)
        assert optimizer.one_pass
        (forward(model) - y).square().sum().backward()
        gradients.append([layer.core.grad for layer in (model[0], model[2])])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_autocast():
    model, x, y = data()
    model, x, y = model.float(), x.float(), y.float()
    exact = copy.deepcopy(model)
    for net, enabled in ((model, True), (exact, False)):
        optimizer = TDLRT(sgd(net, momentum=0.0), net)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = (net(x).float() - y).square().mean()
        loss.backward()
        assert net[0].core.grad.dtype == torch.float32
        optimizer.step()
        check_orthonormal(net[0].point)
    difference = (model[0].dense_weight() - exact[0].dense_weight()).norm()
    assert difference < 0.02 * exact[0].dense_weight().norm()


def test_with_layers_of_other_kinds_in_one_model(tltorch):
    torch.manual_seed(0)
    theirs = tltorch.FactorizedLinear((2, 4), (2, 3), factorization="tucker", rank=0.6)
    theirs.weight.normal_(0, 0.3)
    model = nn.Sequential(TuckerLinear(10, 8, 3), nn.Tanh(), theirs)
    x, y = torch.randn(12, 10), torch.randn(12, 6)
    results = []
    for one_pass in (True, False):
        net = copy.deepcopy(model)
        optimizer = TDLRT(sgd(net), net, integrator="tdlrt", one_pass=one_pass)

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            return loss

        with pytest.raises(TypeError, match="closure"):
            optimizer.step()
        for _ in range(3):
            optimizer.step(closure)
        results.append(net(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_layers_are_disarmed_between_and_when_the_optimizer_is_gone():
    model, x, y = data()
    optimizer = TDLRT(sgd(model), model, basis_every=2)
    (model(x) - y).square().sum().backward()
    assert optimizer.ranks["0"] == (6, 6)
    optimizer.step()
    optimizer.zero_grad()
    bases = [factor.clone() for factor in model[0].factors]
    (model(x) - y).square().sum().backward()
    assert optimizer.ranks["0"] == (3, 3)  # an ordinary step of the cores
    optimizer.step()
    assert all(map(torch.equal, model[0].factors, bases))
    assert model[0].armed
    del optimizer
    gc.collect()
    assert not model[0].armed


def test_an_optimizer_that_is_replaced_leaves_the_new_one_armed():
    model, x, y = data()
    optimizer = TDLRT(sgd(model), model)
    optimizer = TDLRT(sgd(model), model)  # the first one goes only now
    gc.collect()
    assert model[0].armed
    (model(x) - y).square().sum().backward()
    assert optimizer.ranks["0"] == (6, 6)


class NoItems(TorchDispatchMode):
    """Raises where a number is taken from a tensor."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_how_often_the_device_is_asked(monkeypatch, momentum):
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (TuckerLinear(16, 16, 4), nn.Tanh())]
    model = nn.Sequential(*layers)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 1e-3, momentum), model, basis_every=2)
    x, y = torch.randn(64, 16), torch.randn(64, 16)
    questions, lists = [], _ops.lists
    monkeypatch.setattr(
        _ops, "lists", lambda vectors: questions.extend(vectors[:1]) or lists(vectors)
    )
    for late_check, between in ((False, 1), (True, 0)):
        optimizer.late_check = late_check
        for expected in (2, between, 2, between):
            questions.clear()
            with NoItems():
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
            assert len(questions) == expected


def test_inference_and_frozen_layers_do_not_lift():
    model, x, y = data()
    optimizer = TDLRT(sgd(model), model)
    with torch.no_grad():
        model(x)
    model[0].core.requires_grad_(False)
    (model(x) - y).square().sum().backward()
    assert optimizer.ranks == {"0": (3, 3), "2": (6, 6)}


def test_second_derivatives_are_refused():
    model, x, _ = data()
    optimizer = TDLRT(sgd(model), model)
    assert optimizer.one_pass
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_a_failed_step_leaves_the_lift_as_it_was():
    weights = []
    for fails in (False, True):
        model, x, y = data()
        optimizer = TDLRT(sgd(model, lr=0.01), model)
        for step in range(3):
            optimizer.zero_grad()
            (model(x) - y).square().sum().backward()
            if fails and step == 1:
                grad = model[2].bias.grad.clone()
                model[2].bias.grad[0] = float("nan")
                with pytest.raises(gt.NonFiniteError):
                    optimizer.step()
                model[2].bias.grad.copy_(grad)
            (model(x) - y).square().sum().backward()  # a second micro-batch
            optimizer.step()
        weights.append([layer.dense_weight().detach() for layer in (model[0], model[2])])
    torch.testing.assert_close(*weights, rtol=0, atol=1e-13)


def test_momentum_of_the_bases_outlasts_steps_of_the_cores():
    model, x, y = data()
    inner = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    optimizer = TDLRT(inner, model, basis_every=2)
    layer = model[0]

    def step():
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        optimizer.step()
        return right_bases(layer.core.detach()), dict(optimizer.state[layer.core]["tangent"])

    (q_old, before), (q_new, after) = step(), step()
    assert not torch.allclose(q_old[0], q_new[0])
    torch.testing.assert_close(after["right"], before["right"], rtol=0, atol=0)
    parts = after["momentum_buffer"], layer.extension.drift.at(q_new)
    for old, new, b, c, q in zip(*parts, q_old, q_new, after["right"], strict=True):
        assert old.abs().max() > 0
        torch.testing.assert_close(q, b, rtol=0, atol=1e-12)
        torch.testing.assert_close(new @ c.T, 0.9 * old @ b.T @ c @ c.T, rtol=0, atol=1e-12)
    assert sorted(after) == ["momentum_buffer", "right"]


def test_bases_move_in_every_step_at_first_and_then_in_every_second(monkeypatch):
    monkeypatch.setattr("geotucker_torch._optimizer._EARLY", 6)
    model, x, y = data()
    optimizer = TDLRT(sgd(model, lr=1e-4), model)
    moved = []
    for _ in range(10):
        before = [factor.clone() for factor in model[0].factors]
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        optimizer.step()
        moved.append(not all(map(torch.equal, before, model[0].factors)))
    assert moved == [True] * 6 + [True, False] * 2


@pytest.mark.parametrize("integrator", ["tangent", "tdlrt"])
@pytest.mark.parametrize("every", [1, 2])
def test_adam_moves_a_weight_as_far_as_the_dense_one(integrator, every):
    torch.manual_seed(0)
    layer = TuckerLinear(40, 30, ranks=3, dtype=torch.float64)
    x, g = torch.randn(200, 40).double(), torch.randn(200, 30).double()
    rate = 1e-3
    # After the first steps the moments of entries differ, so that only these are exact.
    inner = torch.optim.AdamW(layer.parameters(), rate, weight_decay=0.1, eps=1e-30)
    optimizer = TDLRT(inner, layer, 6, integrator=integrator, basis_every=every)
    for _ in range(every):
        before = layer.dense_weight().detach().clone()
        optimizer.zero_grad()
        (layer(x) * g).sum().backward()
        with torch.no_grad():
            optimizer.step()
        moved = layer.dense_weight().detach() - before * (1 - rate * 0.1)
        expected = rate * (30 * 40) ** 0.5
        assert abs(moved.norm() / expected - 1) < (1e-6 if optimizer._steps == 1 else 0.3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"rate_power": 0.0}),
        (torch.optim.SGD, {}),
        (torch.optim.Adadelta, {}),
    ],
)
def test_steps_that_are_not_to_be_matched_stay(kind, options):
    model, x, y = data()
    inner = kind(model.parameters(), lr=1e-3)
    optimizer = TDLRT(inner, model, 100, basis_every=2, **options)

    def backward():
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()

    backward()
    optimizer.step()
    backward()  # the second step is one of the cores alone
    core = model[0].core
    alone = torch.nn.Parameter(core.detach().clone())
    alone.grad, other = core.grad.clone(), kind([alone], lr=1e-3)
    state = {k: v for k, v in inner.state[core].items() if k != "tangent"}
    other.state[alone] = copy.deepcopy(state)
    other.step()
    optimizer.step()
    assert torch.equal(core, alone)


@pytest.mark.parametrize("rule", [None, gt.Fixed(3), gt.Tolerance(0.01)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_layer_that_is_not_used_keeps_its_momentum(kind, rule):
    torch.manual_seed(0)
    pair = nn.ModuleList([nn.Linear(10, 8), nn.Linear(10, 8)])
    model = factorize(pair, 3, verbose=False).double()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = TDLRT(kind(model.parameters(), 0.01, **options), model, rule, basis_every=1)
    x, y = torch.randn(12, 10).double(), torch.randn(12, 8).double()
    for used in ([0, 1], [0, 1], [0]):
        before = copy.deepcopy(optimizer.state[model[1].core]), model[1].point
        optimizer.zero_grad()
        sum((model[one](x) - y).square().mean() for one in used).backward()
        optimizer.step()
    state, point = before
    assert all(part.any() for parts in state["tangent"].values() for part in parts)
    torch.testing.assert_close(optimizer.state[model[1].core], state, rtol=0, atol=0)
    assert all(map(torch.equal, model[1].point.factors, point.factors))
    assert torch.equal(model[1].core, point.core)


@pytest.mark.parametrize("integrator", ["tangent", "tdlrt"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_rates_grow_as_ranks_fall(integrator, nesterov):
    def weights(power, scales):
        model, x, y = data()
        groups = [
            {"params": [parameter], "lr": 0.05 * scales.get(name, 1.0)}
            for name, parameter in model.named_parameters()
        ]
        inner = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
        optimizer = TDLRT(inner, model, integrator=integrator, basis_every=2, rate_power=power)
        for _ in range(6):  # every other one is a step of the cores alone
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        return model(x)

    # (3, 3) of 16x10 and of 14x16: tangent spaces of 9 + 3 * 13 + 3 * 7 dimensions, and so on.
    rates = {"0.core": (160 / 69) ** 0.25, "2.core": (224 / 81) ** 0.25}
    torch.testing.assert_close(weights(0.25, {}), weights(0.0, rates), rtol=0, atol=1e-12)
    assert not torch.allclose(weights(None, {}), weights(0.25, {}), rtol=0, atol=1e-3)
    assert torch.equal(weights(None, {}), weights(0.0, {}))


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Muon", "NAdam"])
def test_decay_beside_the_step_is_not_scaled(name):
    kind = getattr(torch.optim, name, None)
    if kind is None:
        pytest.skip(f"this version of PyTorch has no {name}")
    torch.manual_seed(0)
    layer = TuckerLinear(20, 16, 2, bias=False)
    options = {"decoupled_weight_decay": True} if name == "NAdam" else {}
    inner = kind([layer.core], lr=0.1, weight_decay=0.1, **options)
    optimizer = TDLRT(inner, layer, rate_power=0.25)
    before = layer.dense_weight().detach().clone()
    (0.0 * layer(torch.randn(3, 20)).sum()).backward()
    optimizer.step()
    torch.testing.assert_close(layer.dense_weight(), 0.99 * before)


def test_a_core_frozen_between_backward_and_step():
    model, x, y = data()
    optimizer = TDLRT(sgd(model), model)
    (model(x) - y).square().mean().backward()
    model[0].core.requires_grad_(False)
    optimizer.step()  # which steps it all the same: it has a gradient
    assert model[0].core.shape == model[2].core.shape == (3, 3)
    core = model[0].core.clone()
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()
    assert torch.equal(model[0].core, core)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_ascent_is_descent_on_the_negative_loss(kind):
    ends = []
    for maximize in (False, True):
        model, x, y = data()
        momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        inner = kind(model.parameters(), lr=0.01, maximize=maximize, **momentum)
        optimizer = TDLRT(inner, model)
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            (-loss if maximize else loss).backward()
            optimizer.step()
        ends.append([layer.dense_weight() for layer in (model[0], model[2])])
    torch.testing.assert_close(*ends, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), 0.9),
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.5), 1.8),
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=1.0), 0.0),
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, maximize=True), -0.9),
        (lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9)), 4.0),
        (lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01, momentum=0.8), 4.0),
    ],
)
def test_what_the_last_velocity_counts_beside_a_gradient(inner, expected):
    if "Muon" in inner.__code__.co_names and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    model, x, y = data()
    optimizer = TDLRT(inner(model.parameters()), model)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert model[0].extension.drift.weight() == pytest.approx(expected)
    for group in optimizer.param_groups:  # as schedulers do between steps
        group.update(momentum=0.0) if "momentum" in group else group.update(betas=(0.0, 0.9))
    assert model[0].extension.drift.weight() == 0.0


def test_factors_that_were_thawed_have_no_part_in_what_is_clipped():
    norms = []
    for thaw in (False, True):
        model, x, y = data()
        optimizer = TDLRT(sgd(model), model, basis_every=2)
        norms.append([])
        for _ in range(4):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            norms[-1].append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
            if thaw:
                model.requires_grad_(False).requires_grad_(True)
            optimizer.step()
    assert norms[0] == norms[1]


@pytest.mark.parametrize("rule", [None, gt.Tolerance(0.1)])
@pytest.mark.parametrize("closure", [False, True])
def test_steps_under_autocast_are_those_outside(rule, closure):
    ends = []
    for under in (False, True):
        model, x, y = data()
        model, x, y = model.float(), x.float(), y.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=under and not closure):
            optimizer = TDLRT(sgd(model, momentum=0.9), model, rule, one_pass=not closure)

        def evaluate(optimizer=optimizer, model=model, x=x, y=y):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(x).float() - y).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            if not closure:
                evaluate()
            with torch.autocast("cpu", torch.bfloat16, enabled=under):
                optimizer.step(evaluate if closure else None)
        ends.append(model.state_dict())
    # Backward passes under autocast, as those of a closure are here, round more often.
    torch.testing.assert_close(*ends, rtol=0, atol=1e-3 if closure else 0)
