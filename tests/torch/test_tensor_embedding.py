"""Embeddings whose table is kept as a tensor of higher order."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import geotucker as gt
from geotucker.testing import check_orthonormal
from geotucker_torch import (
    TDLRT,
    TuckerEmbedding,
    TuckerTensorEmbedding,
    TuckerTensorLinear,
    densify,
    factorize,
    finalize,
    load_checkpoint,
    load_weights,
    optimize_for_inference,
    plan,
    save_checkpoint,
    spectra,
)
from geotucker_torch._tensor_lookup import multi_index
from geotucker_torch._tensor_plan import TensorSizes, cheapest_projections, operations, price

from .cases import backward_with_exact_directions, close, sgd, trained

DOUBLE = {"dtype": torch.float64}
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def layers(draw, leads=((), (5,), (2, 7), (0,))):
    torch.manual_seed(draw(st.integers(0, 99)))
    rows = draw(SHAPES)
    number = torch.Size(rows).numel()
    layer = TuckerTensorEmbedding(
        rows,
        draw(SHAPES),
        draw(st.integers(1, 4)),
        draw(st.none() | st.integers(-number, number - 1)),
        draw(st.booleans()),
        **DOUBLE,
    )
    kind = draw(st.sampled_from([torch.int32, torch.int64]))
    return layer, torch.randint(number, draw(st.sampled_from(leads)), dtype=kind)


def small(**options):
    torch.manual_seed(0)
    layer = TuckerTensorEmbedding((3, 4, 5), (4, 5), 2, **{**DOUBLE, **options})
    return layer, torch.randint(60, (7, 3))


# The map


@given(layers())
def test_is_the_dense_layer(drawn):
    layer, x = drawn
    dense = layer.to_dense()
    assert type(dense) is nn.Embedding and layer.weight_shape == dense.weight.shape
    assert (dense.padding_idx, dense.scale_grad_by_freq) == (
        layer.padding_idx,
        layer.scale_grad_by_freq,
    )
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-12)
    if layer.padding_idx is not None:
        row = layer(torch.tensor(layer.padding_idx))
        torch.testing.assert_close(row, torch.zeros_like(row), rtol=0, atol=1e-12)


@given(SHAPES)
def test_indices_run_in_c_order(shape):
    x = torch.arange(torch.Size(shape).numel())
    expected = torch.unravel_index(x, shape)
    assert all(map(torch.equal, multi_index(x, shape), expected))


@given(layers())
def test_gradients_in_two_passes_are_autograds(drawn):
    layer, x = drawn
    for factor in layer.factors:
        factor.requires_grad_(True)
    layer(x).square().sum().backward()
    copies = [p.detach().clone().requires_grad_() for p in (layer.core, *layer.factors)]
    table = gt.to_dense((copies[0], copies[1:])).reshape(layer.weight_shape)
    dense = layer.to_dense()
    nn.functional.embedding(
        x, table, dense.padding_idx, scale_grad_by_freq=dense.scale_grad_by_freq
    ).square().sum().backward()
    for parameter, expected in zip((layer.core, *layer.factors), copies, strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-10, atol=1e-10)


def test_a_lookup_forms_no_table():
    layer = TuckerTensorEmbedding((10, 10, 10), (20, 20), 2)
    optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1), layer)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Sizes():
        layer(torch.randint(1000, (50,))).square().sum().backward()
        optimizer.step()
    assert max(sizes) <= 50 * 400 < 1000 * 400


def test_starts_as_torch_does():
    torch.manual_seed(0)
    weights = [TuckerTensorEmbedding((8, 9), (9, 10), 5).dense_weight() for _ in range(40)]
    assert torch.stack(weights).var().item() == pytest.approx(1.0, rel=0.1)


def test_autocast_leaves_lookups_in_their_precision_as_torch_does():
    layer, x = small(dtype=torch.float32)
    for armed in (False, True):
        if armed:
            assert TDLRT(sgd(layer), layer).one_pass
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: TuckerTensorEmbedding(6, (2,)), TypeError, "row_shape"),
        (lambda: TuckerTensorEmbedding((2, 3), "a"), TypeError, "column_shape"),
        (lambda: TuckerTensorEmbedding((2, 0), (2,)), gt.ShapeError, "row_shape"),
        (lambda: TuckerTensorEmbedding((2, 3), (2.0,)), gt.ShapeError, "column_shape"),
        (lambda: TuckerTensorEmbedding((2, 3), (2,), gt.Tolerance(0.1)), gt.RankError, "ranks"),
        (
            lambda: TuckerTensorEmbedding((2, 3), (2,), padding_idx=6),
            ValueError,
            "padding_idx: expected an index of 6 embeddings, got 6",
        ),
        (lambda: small()[0](torch.ones(2)), TypeError, "x: expected indices"),
        (lambda: small()[0](torch.tensor([60])), IndexError, "out of range"),
        (lambda: small()[0](torch.tensor([-1])), IndexError, "out of range"),
        (lambda: small()[0](torch.full((99,), 60)), IndexError, "out of range"),
        (
            lambda: TuckerTensorEmbedding.from_dense(nn.Embedding(6, 4, max_norm=2.0)),
            ValueError,
            "max_norm=2.0",
        ),
        (
            lambda: TuckerTensorEmbedding.from_dense(nn.Embedding(6, 4, sparse=True)),
            ValueError,
            "sparse=False",
        ),
        (
            lambda: TuckerTensorEmbedding.from_dense(nn.Embedding(6, 4), row_shape=(2, 2)),
            gt.ShapeError,
            "row_shape: expected integers whose product is 6",
        ),
        (
            lambda: TuckerTensorEmbedding.from_dense(nn.Linear(6, 4)),
            TypeError,
            r"nn\.Embedding",
        ),
    ],
)
def test_arguments_are_checked(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_from_dense_keeps_options_and_on_the_meta_device():
    dense = nn.Embedding(30, 20, padding_idx=3, scale_grad_by_freq=True)
    layer = TuckerTensorEmbedding.from_dense(dense, gt.Tolerance(0.0))
    assert (layer.padding_idx, layer.scale_grad_by_freq, layer.bias) == (3, True, None)
    torch.testing.assert_close(layer.dense_weight(), dense.weight, rtol=0, atol=1e-5)
    assert repr(layer).startswith(
        "TuckerTensorEmbedding(\n  (5, 6), (4, 5), padding_idx=3, scale_grad_by_freq=True, ranks="
    )
    meta = nn.Embedding(30, 20, device="meta", dtype=torch.float16)
    layer = TuckerTensorEmbedding.from_dense(meta, 2)
    assert layer.core.is_meta and layer.shape == (5, 6, 4, 5) and layer.core.dtype == torch.float16


# The plan


@st.composite
def sizes(draw):
    shape = draw(st.lists(st.integers(1, 40), min_size=2, max_size=6))
    ranks = [draw(st.integers(1, n)) for n in shape]
    cut = draw(st.integers(1, len(shape) - 1))
    parts = (tuple(part) for part in (shape[:cut], shape[cut:], ranks[:cut], ranks[cut:]))
    return TensorSizes(*parts, batch=draw(st.sampled_from([1, 7, 1000])), looked_up=True)


@given(sizes())
def test_rows_are_always_looked_up_and_the_price_bounds_what_is_paid(given_sizes):
    projected = cheapest_projections(given_sizes)
    assert all(projected[: len(given_sizes.out_shape)])
    cost = price(given_sizes)
    assert cost.tucker(given_sizes.ranks) >= operations(given_sizes, projected)
    assert cost.dense == 0  # a lookup in a table


def test_the_price_of_a_lookup_is_counted():
    # 4 products of the core with rows of length 2 * 2, one column factor, then the other.
    given_sizes = TensorSizes((10, 10), (6, 5), (2, 2), (2, 2), 1, looked_up=True)
    projected = operations(given_sizes, (True,) * 4)
    assert projected == 4 * 4 + 4 * 5 + 6 * 10
    table = operations(given_sizes, (False, False, True, True), folding=False)
    assert table == 4 * 5 + 6 * 10


# Training


@given(layers(leads=((6,), (2, 9))), st.sampled_from([None, gt.Tolerance(0.1), gt.Fixed(2)]))
def test_one_pass_is_two(drawn, rule):
    layer, x = drawn
    # A core without the padding's row is singular: bases of its null space are rounding.
    nn.init.normal_(layer.core)
    one, two = (trained(layer, x, one_pass=flag, rule=rule, number=2) for flag in (True, False))
    assert one.ranks == two.ranks
    check_orthonormal(one.point)
    torch.testing.assert_close(one.dense_weight(), two.dense_weight(), rtol=0, atol=1e-11)


@given(layers(), st.sampled_from(["tangent", "tdlrt"]))
def test_the_gradient_in_wide_bases_is_the_dense_one(drawn, integrator):
    layer, x = drawn
    optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1), layer, integrator=integrator)
    point, dense = layer.point, layer.to_dense()
    g = torch.randn_like(dense(x))
    layer(x).backward(g)
    dense(x).backward(g)
    gradient, wide = dense.weight.grad.reshape(layer.shape), layer.point
    if integrator == "tangent":
        expected = gt.to_dense(gt.tangent_to_point(point, gt.project(point, gradient)))
    else:
        core = gradient
        for factor in wide.factors:
            core = torch.tensordot(core, factor, ([0], [0]))
        expected = gt.to_dense((core, wide.factors))
    got = gt.to_dense((layer.core.grad, wide.factors))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    check_orthonormal(wide)
    optimizer.step()
    check_orthonormal(layer.point)


@pytest.mark.parametrize("batch", [3, 50, 500])  # few lookups, many, and more than there are rows
@pytest.mark.parametrize("smallest", [1.0, 1e-6, 1e-12])
def test_directions_are_exact_at_any_singular_value(smallest, batch, monkeypatch):
    layer, _ = small()
    x, g = torch.randint(60, (batch,)), torch.randn(batch, 20, **DOUBLE)
    point, gradient = backward_with_exact_directions(layer, x, g, smallest, monkeypatch)
    expected = gt.to_dense(gt.tangent_to_point(point, gt.project(point, gradient)))
    close(gt.to_dense((layer.core.grad, layer.point.factors)), expected)


def test_micro_batches_lift_once_and_add_up():
    layer, x = small()
    optimizer = TDLRT(sgd(layer), layer)
    for part in (slice(0, 3), slice(3, 7)):
        layer(x[part]).square().sum().backward()
    gradient = layer.core.grad.clone()
    assert layer.ranks == (3, 4, 4, 4, 4) and layer.settled_ranks == (2,) * 5
    layer.core.grad.zero_()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.core.grad, gradient, rtol=0, atol=1e-10)
    optimizer.zero_grad()
    assert layer.ranks == (2,) * 5


def test_a_gradient_that_is_not_finite_lifts_nothing():
    layer, x = small()
    optimizer = TDLRT(sgd(layer), layer)
    (layer(x).sum() * float("nan")).backward()
    assert layer.ranks == (2,) * 5
    with pytest.raises(gt.NonFiniteError):
        optimizer.step()


@pytest.mark.parametrize("rule", [gt.Budget(parameters=0.5), gt.DescentSafe(), gt.Tolerance(0.1)])
def test_trains_by_every_rule(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(60, 20), nn.Tanh(), nn.Linear(20, 5))
    model = factorize(model, 3, tensorise={"0": 2}, verbose=False)
    assert isinstance(model[0], TuckerTensorEmbedding)
    optimizer = TDLRT(sgd(model), model, rule)
    x, y = torch.arange(60), torch.randint(5, (60,))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# Whole models


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(60, 20), nn.Linear(20, 60, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x).tanh())


def test_factorize_tensorises_embeddings_by_shapes_and_leaves_padding():
    model = nn.Sequential(nn.Embedding(60, 20), nn.Embedding(60, 20, padding_idx=0))
    wanted = {"0": ((3, 4, 5), (4, 5)), "1": 2}
    assert plan(model, 2, tensorise=wanted).layers[0].shape == (3, 4, 5, 4, 5)
    model = factorize(model, 2, tensorise=wanted, verbose=False)
    assert type(model[0]) is TuckerTensorEmbedding and model[0].row_shape == (3, 4, 5)
    assert type(model[1]) is TuckerEmbedding and model[1].padding_idx == 0
    with pytest.raises(gt.ShapeError, match=r"layer '0': out_shape|layer '0': row_shape"):
        factorize(nn.Sequential(nn.Embedding(60, 20)), 2, tensorise=((7, 7), 2))


def test_an_embedding_and_its_output_layer_stay_tied():
    torch.manual_seed(0)
    model = factorize(Words().double(), 2, tensorise=2, verbose=False)
    assert type(model.embed) is TuckerTensorEmbedding and type(model.head) is TuckerTensorLinear
    assert model.embed.core is model.head.core
    x, dense = torch.randint(60, (9,)), densify(copy.deepcopy(model))
    assert dense.head.weight is dense.embed.weight
    point, optimizer = model.embed.point, TDLRT(sgd(model), model)
    y = model(x)
    close(y, dense(x))
    y.square().sum().backward()
    dense(x).square().sum().backward()
    gradient = dense.embed.weight.grad.reshape(model.embed.shape)
    expected = gt.to_dense(gt.tangent_to_point(point, gt.project(point, gradient)))
    close(gt.to_dense((model.embed.core.grad, model.embed.point.factors)), expected)
    optimizer.step()
    plain, y = finalize(model), model(x)
    torch.testing.assert_close(plain(x), y, rtol=0, atol=1e-10)
    shared = {id(p) for p in plain.embed.parameters()} & {id(p) for p in plain.head.parameters()}
    assert len(shared) == 2  # the factors of the vocabulary


@pytest.mark.parametrize("cost", ["parameters", "flops"])
@pytest.mark.parametrize("ranks", [2, (3, 4, 5, 2, 2)])
def test_finalize_gives_what_needs_nothing_of_ours(cost, ranks):
    layer, x = small()
    layer = TuckerTensorEmbedding((3, 4, 5), (4, 5), ranks, padding_idx=7, **DOUBLE)
    new = finalize(nn.Sequential(layer), cost=cost)
    blob = pickle.dumps(new)
    assert b"geotucker" not in blob
    again = pickle.loads(blob)
    for indices in (x, x[0], x[0, 0]):
        torch.testing.assert_close(again(indices), layer(indices), rtol=0, atol=1e-12)
    again(torch.tensor([7])).sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in again.parameters())
    again(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    size = sum(p.numel() for p in new.parameters())
    if cost == "parameters":
        assert size <= layer.point.size
    dense = finalize(nn.Sequential(layer), dense="0")[0]
    assert type(dense) is nn.Embedding and dense.padding_idx == 7


def test_optimize_for_inference():
    layer, x = small()
    fast = optimize_for_inference(nn.Sequential(layer), x, repeats=1, verbose=False)
    torch.testing.assert_close(fast(x), layer(x), rtol=0, atol=1e-12)
    assert "geotucker" not in type(fast[0]).__module__


def test_modes_are_named():
    modes = ("rows 1", "rows 2", "rows 3", "columns 1", "columns 2")
    layer = small()[0]
    assert spectra(layer).weights[0].modes == layer.mode_names == modes


def test_states_of_other_ranks_and_of_dense_layers_load():
    model, other = (nn.Sequential(TuckerTensorEmbedding((5, 6), (4, 5), r)) for r in (3, 2))
    x = torch.arange(30)
    other.load_state_dict(model.state_dict())
    assert other[0].ranks == (3,) * 4 and torch.equal(other(x), model(x))
    dense = nn.Sequential(nn.Embedding(30, 20))
    load_weights(dense, model.state_dict())
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)
    load_weights(other, nn.Sequential(nn.Embedding(30, 20)).state_dict(), ranks=gt.Tolerance(0.1))
    other.load_state_dict(dense.state_dict())  # at the ranks that it has
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        model.load_state_dict(nn.Sequential(nn.Embedding(30, 21)).state_dict())


def test_a_training_goes_on_from_a_checkpoint(tmp_path):
    def build():
        torch.manual_seed(0)
        model = factorize(nn.Sequential(nn.Embedding(60, 20)), 3, tensorise=2, verbose=False)
        adam = torch.optim.Adam(model.parameters(), 0.01)
        return model, TDLRT(adam, model, gt.Budget(parameters=0.3, steps=4))

    def advance(model, optimizer, seeds):
        for seed in seeds:
            x = torch.randint(60, (8,), generator=torch.Generator().manual_seed(seed))
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
