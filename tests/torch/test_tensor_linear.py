"""Linear layers whose matrix is kept as a tensor of higher order."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import geotucker as gt
from geotucker.testing import check_orthonormal
from geotucker_torch import (
    TDLRT,
    TuckerLinear,
    TuckerTensorLinear,
    dense_state_dict,
    densify,
    factorize,
    finalize,
    load_checkpoint,
    load_weights,
    optimize_for_inference,
    plan,
    save_checkpoint,
)
from geotucker_torch._tensor_module import near_equal_factors, split_of
from geotucker_torch._tensor_plan import TensorSizes, cheapest_projections, operations, price
from geotucker_torch._tensorised import tensor_linear

from .cases import backward_with_exact_directions

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def layers(draw, leads=((), (4,), (2, 3))):
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = TuckerTensorLinear(
        draw(SHAPES), draw(SHAPES), draw(st.integers(1, 4)), draw(st.booleans()),
        dtype=torch.float64,
    )  # fmt: skip
    lead = draw(st.sampled_from(leads))
    return layer, torch.randn(*lead, layer.in_features, dtype=torch.float64)


def small():
    torch.manual_seed(0)
    layer = TuckerTensorLinear((4, 5), (5, 6), 2, dtype=torch.float64)
    return layer, torch.randn(7, 20, dtype=torch.float64)


# The map


@given(layers())
def test_is_the_dense_layer(drawn):
    layer, x = drawn
    dense = layer.to_dense()
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-12)
    weight = gt.to_dense(layer.point).reshape(layer.out_features, layer.in_features)
    torch.testing.assert_close(dense.weight.data, weight, rtol=0, atol=1e-12)
    assert layer.dense_weight().shape == layer.weight_shape == dense.weight.shape


@given(layers())
def test_every_order_of_contraction_gives_the_same(drawn):
    layer, x = drawn
    rows = x.reshape(-1, *layer.in_shape)
    expected = layer(x).reshape(len(rows), *layer.out_shape)
    if layer.bias is not None:
        expected = expected - layer.bias.reshape(layer.out_shape)
    factors = list(layer.factors)
    sides = factors[: layer.row_modes], factors[layer.row_modes :]
    for projected in itertools.product([True, False], repeat=len(factors)):
        y = tensor_linear(rows, layer.core, *sides, projected)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@given(layers())
def test_gradients_in_two_passes_are_autograds(drawn):
    layer, x = drawn
    for factor in layer.factors:
        factor.requires_grad_(True)
    layer(x).square().sum().backward()
    weight = layer.dense_weight()
    copies = [p.detach().clone().requires_grad_() for p in (layer.core, *layer.factors)]
    dense = gt.to_dense((copies[0], copies[1:])).reshape(weight.shape)
    bias = None if layer.bias is None else layer.bias.detach()
    nn.functional.linear(x, dense, bias).square().sum().backward()
    for parameter, expected in zip((layer.core, *layer.factors), copies, strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-10, atol=1e-10)


def test_an_empty_batch():
    layer, x = small()
    assert layer(x[:0]).shape == (0, 30)


def test_starts_with_the_variance_of_a_dense_layer():
    torch.manual_seed(0)
    weights = [TuckerTensorLinear((8, 9), (9, 10), 5).dense_weight() for _ in range(40)]
    variance = torch.stack(weights).detach().square().mean()
    assert float(variance) == pytest.approx(1 / (3 * 72), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((4, 5), ()), TypeError, "out_shape"),
        ((20, (5, 6)), TypeError, "in_shape"),
        (("ab", (5, 6)), TypeError, "in_shape"),
        (((4, 0), (5, 6)), gt.ShapeError, "in_shape"),
        (((4, 5), (5, 2.0)), gt.ShapeError, "out_shape"),
        (((4, 5), (5, 6), gt.Tolerance(0.1)), gt.RankError, "ranks"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        TuckerTensorLinear(*arguments)


def test_an_input_that_does_not_fit():
    layer, _ = small()
    for x in (torch.ones(3, 21), torch.ones(())):
        with pytest.raises(gt.ShapeError, match=r"x: expected a last dimension of 20"):
            layer(x.double())


def test_from_dense_checks_shapes_and_layer():
    with pytest.raises(gt.ShapeError, match=r"in_shape: expected integers whose product is 20"):
        TuckerTensorLinear.from_dense(nn.Linear(20, 30), in_shape=(4, 4))
    with pytest.raises(TypeError, match=r"nn\.Linear"):
        TuckerTensorLinear.from_dense(nn.Conv1d(3, 4, 1))


def test_from_dense_on_the_meta_device():
    dense = nn.Linear(20, 30, device="meta", dtype=torch.float16)
    layer = TuckerTensorLinear.from_dense(dense, 2)
    assert layer.core.is_meta and layer.shape == (5, 6, 4, 5) and layer.core.dtype == torch.float16


@given(st.integers(1, 3000), st.integers(1, 4))
def test_near_equal_factors(number, count):
    factors = near_equal_factors(number, count)
    assert math.prod(factors) == number and len(factors) <= count
    assert list(factors) == sorted(factors)
    if number > 1:
        assert min(factors) > 1
    if len(factors) == 2:
        ratios = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
        assert factors[0] == ratios[-1]


def test_splits_that_cannot_be():
    with pytest.raises(TypeError, match="pair"):
        split_of((4, 6), (2, 2, 2))
    with pytest.raises(gt.ShapeError, match="positive"):
        split_of((4, 6), 0)


# The plan


@st.composite
def sizes(draw):
    shape = draw(st.lists(st.integers(1, 40), min_size=2, max_size=6))
    ranks = [draw(st.integers(1, n)) for n in shape]
    cut = draw(st.integers(1, len(shape) - 1))
    parts = (tuple(part) for part in (shape[:cut], shape[cut:], ranks[:cut], ranks[cut:]))
    return TensorSizes(*parts, batch=draw(st.sampled_from([1, 7, 64, 1000])))


@given(sizes())
def test_the_plan_is_as_cheap_as_any_within_a_few_percent(given_sizes):
    order = len(given_sizes.shape)
    prices = [operations(given_sizes, p) for p in itertools.product([True, False], repeat=order)]
    assert operations(given_sizes, cheapest_projections(given_sizes)) <= 1.1 * min(prices)


def test_matrices_are_applied_in_the_cheapest_order():
    def cost(steps, rest):
        total, extents = 0, [n for n, _ in steps]
        for i, (_, after) in enumerate(steps):
            total += rest * math.prod(extents) * after
            extents[i] = after
        return total

    for steps in ([(9, 2), (4, 3), (30, 5)], [(2, 9), (3, 4), (5, 30)], [(9, 2), (2, 9), (4, 4)]):
        named = TensorSizes((1,), tuple(n for n, _ in steps), (1,), tuple(r for _, r in steps), 1)
        projected = (False, *(True,) * 3)
        kernel = math.prod(r for _, r in steps)
        least = min(cost(order, 1) for order in itertools.permutations(steps))
        assert operations(named, projected, folding=False) - kernel == least


@given(sizes())
def test_the_price_for_rank_rules_is_never_below_what_is_paid(given_sizes):
    cost = price(given_sizes)
    assert cost.tucker(given_sizes.ranks) >= operations(
        given_sizes, cheapest_projections(given_sizes)
    )
    wider = tuple(min(r + 1, n) for r, n in zip(given_sizes.ranks, given_sizes.shape, strict=True))
    assert cost.tucker(wider) >= cost.tucker(given_sizes.ranks)
    assert cost.dense == given_sizes.batch * math.prod(given_sizes.shape)


# Training


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **settings})


def trained(layer, x, one_pass, rule, number=2):
    model = copy.deepcopy(layer)
    optimizer = TDLRT(sgd(model), model, rule, integrator="tdlrt", one_pass=one_pass)

    def closure():
        optimizer.zero_grad()
        y = model(x)
        loss = (y - 1).square().mean() + (y**3).mean() / 10
        loss.backward()
        return loss

    for _ in range(number):
        if one_pass:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
    return model


# With a single sample the gradient has rank 1, and what extends the bases beyond it is rounding.
@given(layers(leads=((6,), (2, 4))), st.sampled_from([None, gt.Tolerance(0.1), gt.Fixed(2)]))
def test_one_pass_is_two(drawn, rule):
    layer, x = drawn
    one, two = trained(layer, x, True, rule), trained(layer, x, False, rule)
    assert one.ranks == two.ranks
    check_orthonormal(one.point)
    torch.testing.assert_close(one.dense_weight(), two.dense_weight(), rtol=0, atol=1e-12)
    if layer.bias is not None:
        torch.testing.assert_close(one.bias, two.bias, rtol=0, atol=1e-12)


@given(layers())
def test_the_tangent_gradient_is_the_projected_dense_one(drawn):
    layer, x = drawn
    x.requires_grad_()
    optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1), layer)
    point, dense = layer.point, layer.to_dense()
    g = torch.randn_like(dense(x))
    layer(x).backward(g)
    dx, x.grad = x.grad, None
    dense(x).backward(g)
    torch.testing.assert_close(dx, x.grad, rtol=0, atol=1e-12)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=0, atol=1e-12)
    tangent = gt.project(point, dense.weight.grad.reshape(layer.shape))
    got = gt.to_dense((layer.core.grad, [u.detach() for u in layer.factors]))
    expected = gt.to_dense(gt.tangent_to_point(point, tangent))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert optimizer is not None


@pytest.mark.parametrize("batch", [1, 500])  # factors are projected in one, folded in the other
@pytest.mark.parametrize("smallest", [1.0, 1e-6, 1e-12])
def test_directions_are_exact_at_any_singular_value(smallest, batch, monkeypatch):
    layer, _ = small()
    x = torch.randn(batch, 20, dtype=torch.float64)
    g = torch.randn(batch, 30, dtype=torch.float64)
    backward_with_exact_directions(layer, x, g, smallest, monkeypatch)


def test_micro_batches_lift_once_and_add_up():
    layer, x = small()
    optimizer = TDLRT(sgd(layer), layer)
    for part in (slice(0, 3), slice(3, 7)):
        layer(x[part]).square().sum().backward()
    gradient = layer.core.grad.clone()
    assert layer.ranks == (4, 4, 4, 4) and layer.settled_ranks == (2, 2, 2, 2)
    layer.core.grad.zero_()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.core.grad, gradient, rtol=0, atol=1e-10)
    optimizer.zero_grad()
    assert layer.ranks == (2, 2, 2, 2)


def test_a_gradient_that_is_not_finite_lifts_nothing():
    layer, x = small()
    optimizer = TDLRT(sgd(layer), layer)
    (layer(x).sum() * float("nan")).backward()
    assert layer.ranks == (2, 2, 2, 2)
    with pytest.raises(gt.NonFiniteError):
        optimizer.step()


def test_autocast():
    layer, x = small()
    layer, x = layer.float(), x.float()
    exact = copy.deepcopy(layer)
    for model, enabled in ((layer, True), (exact, False)):
        optimizer = TDLRT(sgd(model, momentum=0.0), model)
        for _ in range(2):  # the second without autocast's first cast
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                y = model(x)
            assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
            (y.float() - 1).square().mean().backward()
            assert model.core.grad.dtype == torch.float32
            optimizer.step()
        check_orthonormal(model.point)
    difference = (layer.dense_weight() - exact.dense_weight()).norm()
    assert difference < 0.02 * exact.dense_weight().norm()


@pytest.mark.parametrize(
    "rule", [gt.Budget(parameters=0.4), gt.Budget(flops=0.4), gt.DescentSafe(), gt.Tolerance(0.1)]
)
def test_trains_by_every_rule(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 20))
    model = factorize(model, 4, tensorise={"0": 2}, verbose=False)
    optimizer = TDLRT(sgd(model), model, rule)
    x, y = torch.randn(40, 24), torch.randn(40, 20)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if rule.__class__ is gt.Budget and rule.parameters:
        dense = 24 * 30 + 30 + 30 * 20 + 20
        assert sum(p.numel() for p in model.parameters()) <= 0.4 * dense


# Whole models


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(500, 800), nn.ReLU(), nn.Linear(800, 7))


def test_factorize_tensorises_on_request():
    model = model_of()
    table = plan(model, 4, tensorise={"0": ((10, 80), (20, 25)), "*": 2})
    assert [row.shape for row in table.layers] == [(10, 80, 20, 25), (7, 25, 32)]
    assert table.layers[0].after == 4**4 + 4 * (10 + 80 + 20 + 25) + 800
    biases = [model[0].bias, model[2].bias]
    model = factorize(model, 4, tensorise={"0": ((10, 80), (20, 25)), "*": 2}, verbose=False)
    assert isinstance(model[0], TuckerTensorLinear) and isinstance(model[2], TuckerTensorLinear)
    assert model[0].out_shape == (10, 80) and model[0].in_shape == (20, 25)
    assert [model[0].bias, model[2].bias] == biases


def test_what_cannot_be_split_and_what_is_not_named_stays_a_matrix():
    model = nn.Sequential(nn.Linear(11, 13), nn.Linear(13, 13), nn.Conv1d(13, 13, 2))
    model = factorize(model, 2, tensorise=3, verbose=False)
    assert isinstance(model[0], TuckerLinear) and isinstance(model[1], TuckerLinear)
    model = factorize(model_of(), 2, tensorise={"0": 2}, verbose=False)
    assert isinstance(model[2], TuckerLinear)


def test_factorize_keeps_the_function_at_full_ranks_and_takes_tolerance_and_budget():
    x = torch.randn(3, 24).double()
    dense = nn.Linear(24, 30).double()
    with torch.no_grad():
        tensor = gt.testing.random_point((5, 6, 4, 6), (2, 2, 2, 2), seed=0)
        matrix = gt.to_dense(tensor).reshape(30, 24)
        dense.weight.copy_(torch.tensor(matrix))
    shapes = ((5, 6), (4, 6))
    small_model = factorize(copy.deepcopy(dense), gt.Tolerance(1e-8), tensorise=2, verbose=False)
    assert small_model.ranks == (2, 2, 2, 2) and small_model.shape == (*shapes[0], *shapes[1])
    torch.testing.assert_close(small_model(x), dense(x), rtol=0, atol=1e-9)
    budget = gt.Budget(parameters=0.3)
    small_model = factorize(copy.deepcopy(dense), budget, tensorise=shapes, verbose=False)
    assert sum(p.numel() for p in small_model.parameters()) <= 0.3 * 750


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ({"0": ((10, 81), (20, 25))}, gt.ShapeError, r"layer '0': out_shape"),
        ("2", TypeError, "tensorise"),
        ({0: 2}, TypeError, "tensorise"),
        (0, gt.ShapeError, "positive"),
        (True, TypeError, "tensorise"),
    ],
)
def test_requests_are_checked_before_anything_changes(wanted, error, message):
    model = model_of()
    with pytest.raises(error, match=message):
        factorize(model, 4, tensorise=wanted)
    assert isinstance(model[0], nn.Linear)


def test_a_pattern_that_matches_nothing_is_told():
    assert plan(model_of(), 4, tensorise={"fc": 2}).unmatched == ("fc",)


def test_densify_and_back():
    layer, x = small()
    dense = densify(nn.Sequential(copy.deepcopy(layer)))
    assert type(dense[0]) is nn.Linear
    torch.testing.assert_close(dense(x), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cost", ["parameters", "flops"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_finalize_gives_a_chain_that_needs_nothing_of_ours(cost, lead):
    torch.manual_seed(0)
    layer = TuckerTensorLinear((20, 25), (10, 80), 4, dtype=torch.float64)
    x = torch.randn(*lead, 500, dtype=torch.float64)
    new = finalize(nn.Sequential(layer), cost=cost)
    assert sum(p.numel() for p in new.parameters()) == layer.point.size + 800
    blob = pickle.dumps(new)
    assert b"geotucker" not in blob
    again = pickle.loads(blob)
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=1e-12)
    again(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    assert finalize(nn.Sequential(layer), dense="0")[0].weight.shape == (800, 500)


def test_finalize_folds_what_is_complete():
    layer = TuckerTensorLinear((4, 5), (5, 6), (1, 1, 4, 5))
    chain = finalize(nn.Sequential(layer))[0]
    assert sum(p.numel() for p in chain.parameters()) == 20 + 11 + 30
    x = torch.randn(3, 20)
    torch.testing.assert_close(chain(x), layer(x), rtol=1e-5, atol=1e-6)


def test_optimize_for_inference():
    layer, x = small()
    fast = optimize_for_inference(nn.Sequential(layer), x, repeats=1, verbose=False)
    torch.testing.assert_close(fast(x), layer(x), rtol=0, atol=1e-12)
    assert "geotucker" not in type(fast[0]).__module__


def test_loads_dense_weights_and_back():
    model = nn.Sequential(small()[0].float())
    dense = nn.Sequential(nn.Linear(20, 30))
    load_weights(model, dense.state_dict(), ranks=gt.Tolerance(1e-7))
    x = torch.randn(3, 20)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    other = nn.Sequential(nn.Linear(20, 30))
    load_weights(other, model.state_dict())
    torch.testing.assert_close(other(x), dense(x), rtol=1e-4, atol=1e-5)
    model = nn.Sequential(small()[0].float())
    model.load_state_dict(dense.state_dict())  # at the ranks that it has
    assert model[0].ranks == (2, 2, 2, 2)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        model.load_state_dict(nn.Sequential(nn.Linear(20, 31)).state_dict())


def test_attention_of_tensors_becomes_dense_and_loads():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.MultiheadAttention(16, 2, kdim=12, vdim=6))
    model = factorize(copy.deepcopy(dense), 3, tensorise=2, rescale=False, verbose=False)
    assert model[0].k_proj.shape == (4, 4, 3, 4)
    inputs = torch.randn(5, 3, 16), torch.randn(7, 3, 12), torch.randn(7, 3, 6)
    expected = model[0](*inputs)[0]
    load_weights(dense, model.state_dict())
    for other in (dense, densify(copy.deepcopy(model)), finalize(model)):
        torch.testing.assert_close(other[0](*inputs)[0], expected, rtol=0, atol=1e-5)


def test_a_state_alone_has_the_tensor():
    state = nn.Sequential(small()[0]).state_dict()
    assert dense_state_dict(state)["0.weight"].shape == (5, 6, 4, 5)


def test_a_training_goes_on_from_a_checkpoint(tmp_path):
    def build():
        torch.manual_seed(0)
        model = factorize(nn.Sequential(nn.Linear(20, 30)), 3, tensorise=2, verbose=False)
        adam = torch.optim.Adam(model.parameters(), 0.01)
        return model, TDLRT(adam, model, gt.Budget(parameters=0.5, steps=4))

    def advance(model, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(8, 20, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()

    unbroken, resumed = build(), build()
    advance(*unbroken, range(3))
    save_checkpoint(tmp_path / "file", *unbroken)
    advance(*unbroken, range(3, 6))
    load_checkpoint(tmp_path / "file", *resumed)
    advance(*resumed, range(3, 6))
    assert all(map(torch.equal, unbroken[0].parameters(), resumed[0].parameters()))
