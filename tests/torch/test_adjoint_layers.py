"""Embeddings and transposed convolutions: as their dense layers, and in one pass as in two."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import geotucker as gt
from geotucker.testing import check_orthonormal
from geotucker_torch import (
    TDLRT,
    TuckerConv2d,
    TuckerConvTranspose1d,
    TuckerConvTranspose2d,
    TuckerEmbedding,
    factorize,
    plan,
)
from geotucker_torch._contract import contract
from geotucker_torch._plan import CONTRACTIONS

from .cases import embeddings, trained, transposed

DOUBLE = {"dtype": torch.float64}
either = st.one_of(embeddings(), transposed())


def close(a: Tensor, b: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def gradients(layer: nn.Module, x: Tensor, weight: Tensor, y: Tensor, g: Tensor) -> list[Tensor]:
    wanted = [weight, *([layer.bias] if getattr(layer, "bias", None) is not None else [])]
    wanted += [x] if x.is_floating_point() else []
    return list(torch.autograd.grad(y, wanted, g))


@given(either)
def test_forward_and_gradients_are_those_of_the_dense_layer(case: Any) -> None:
    layer, x = case
    dense = layer.to_dense()
    assert type(dense) is layer.dense_type
    if x.is_floating_point():
        x.requires_grad_()
    expected = dense(x)
    g = torch.randn_like(expected)
    weight, *others = gradients(dense, x, dense.weight, expected, g)
    seen = weight
    for factor in layer.factors:
        seen = torch.tensordot(seen, factor.detach(), ([0], [0]))
    for order in [*CONTRACTIONS, None]:
        y = contract(layer.map, x, layer.core, list(layer.factors), layer.bias, order)
        close(y, expected)
        core, *found = gradients(layer, x, layer.core, y, g)
        close(core, seen)
        for a, b in zip(found, others, strict=True):
            close(a, b)
    close(layer(x), expected)


@given(either, st.sampled_from(["tangent", "tdlrt"]))
def test_the_gradient_in_wide_bases_is_the_dense_one(case: Any, integrator: str) -> None:
    layer, x = case
    optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1), layer, integrator=integrator)
    point, dense = layer.point, layer.to_dense()
    g = torch.randn_like(dense(x))
    layer(x).backward(g)
    dense(x).backward(g)
    wide = layer.point
    if integrator == "tangent":
        tangent = gt.project(point, dense.weight.grad)
        expected = gt.to_dense(gt.tangent_to_point(point, tangent))
    else:
        core = dense.weight.grad
        for factor in wide.factors:
            core = torch.tensordot(core, factor, ([0], [0]))
        expected = gt.to_dense((core, wide.factors))
    close(gt.to_dense((layer.core.grad, wide.factors)), expected)
    check_orthonormal(wide)
    close(gt.to_dense(wide), gt.to_dense(point))
    if layer.bias is not None:
        close(layer.bias.grad, dense.bias.grad)
    optimizer.step()
    check_orthonormal(layer.point)


@given(either, st.sampled_from([None, gt.Tolerance(0.1), gt.Fixed(2)]))
def test_one_pass_is_two(case: Any, rule: Any) -> None:
    layer, x = case
    assume(x.numel() > 1)  # the gradient of one lookup has rank one, the rest is rounding
    one, two = (trained(layer, x, one_pass=flag, rule=rule) for flag in (True, False))
    assert one.ranks == two.ranks
    close(one.dense_weight(), two.dense_weight(), 1e-12)
    if layer.bias is not None:
        close(one.bias, two.bias, 1e-12)


# Embeddings


def test_the_padding_is_zero_and_stays_so() -> None:
    torch.manual_seed(0)
    for ranks in (3, 6):
        layer = TuckerEmbedding(7, 8, ranks, padding_idx=-2, **DOUBLE)
        assert layer.padding_idx == 5
        check_orthonormal(layer.point)
        x = torch.tensor([[0, 5, 2], [5, 6, 5]])
        steps_taken = trained(layer, x, one_pass=True, rule=None)
        for stage in (layer, steps_taken):
            assert not stage(torch.tensor(5)).any()
            assert stage(torch.tensor(4)).any()
    full = TuckerEmbedding(3, 8, 3, padding_idx=0, **DOUBLE)
    close(full(torch.tensor(0)), torch.zeros(8, **DOUBLE))
    check_orthonormal(full.point)


def test_embeddings_start_as_torch_does() -> None:
    torch.manual_seed(0)
    layer = TuckerEmbedding(400, 300, 50)
    assert layer.dense_weight().var().item() == pytest.approx(1.0, rel=0.1)


def test_a_lookup_forms_no_table() -> None:
    number, size = 500, 400
    layer = TuckerEmbedding(number, size, 5)
    optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1), layer)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Sizes():
        layer(torch.randint(number, (200,))).square().sum().backward()
        optimizer.step()
    assert max(sizes) <= max(200 * size, number * 20) < number * size


def test_autocast_leaves_lookups_in_their_precision_as_torch_does() -> None:
    layer, x = TuckerEmbedding(9, 8, 3), torch.tensor([1, 2])
    for armed in (False, True):
        if armed:
            optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1), layer)
            assert optimizer.one_pass
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.float32


def test_embeddings_keep_their_options() -> None:
    dense = nn.Embedding(30, 20, padding_idx=3, scale_grad_by_freq=True)
    layer = TuckerEmbedding.from_dense(dense, 4)
    assert (layer.padding_idx, layer.scale_grad_by_freq, layer.bias) == (3, True, None)
    back = layer.to_dense()
    assert (back.padding_idx, back.scale_grad_by_freq) == (3, True)
    assert "bias" not in vars(back)
    assert repr(layer) == (
        "TuckerEmbedding(\n  30, 20, padding_idx=3, scale_grad_by_freq=True, ranks=(4, 4), "
        "weight parameters 216 of 600\n  (factors): ParameterList(\n"
        "      (0): Parameter containing: [torch.float32 of size 30x4]\n"
        "      (1): Parameter containing: [torch.float32 of size 20x4]\n  )\n)"
    )


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: TuckerEmbedding(0, 3), gt.ShapeError, "num_embeddings: .*got 0"),
        (lambda: TuckerEmbedding(3, 0), gt.ShapeError, "embedding_dim: .*got 0"),
        (lambda: TuckerEmbedding(3, 3, padding_idx=3), ValueError, "padding_idx: .*got 3"),
        (lambda: TuckerEmbedding(3, 3, -1), gt.RankError, "ranks: "),
        (lambda: TuckerEmbedding(3, 3)(torch.ones(2)), TypeError, "x: expected indices"),
        (lambda: TuckerEmbedding(3, 3)(torch.tensor([3])), IndexError, "out of range"),
        (
            lambda: TuckerEmbedding.from_dense(nn.Embedding(3, 3, max_norm=2.0)),
            ValueError,
            "max_norm=2.0",
        ),
        (
            lambda: TuckerEmbedding.from_dense(nn.Embedding(3, 3, sparse=True)),
            ValueError,
            "sparse=False",
        ),
        (lambda: TuckerConvTranspose2d(4, 6, 3, groups=4), gt.ShapeError, "groups: .*got 4"),
        (lambda: TuckerConvTranspose2d(4, 6, 3, padding=-1), gt.ShapeError, "padding: .*got -1"),
        (
            lambda: TuckerConvTranspose2d(4, 6, 3, output_padding=1),
            gt.ShapeError,
            "output_padding: expected less than stride .*got 1",
        ),
        (
            lambda: TuckerConvTranspose2d(4, 6, 3)(torch.ones(1, 6, 5, 5)),
            gt.ShapeError,
            r"x: expected shape \(batch, 4, n_1, n_2\)",
        ),
        (
            lambda: TuckerConvTranspose1d(4, 6, 3, stride=2)(torch.ones(1, 4, 5), [14]),
            gt.ShapeError,
            r"output_size: expected sizes from \[11\] to \[12\]",
        ),
        (
            lambda: TuckerConvTranspose1d(4, 6, 3)(torch.ones(1, 4, 5), [1, 2, 3, 4]),
            gt.ShapeError,
            "output_size",
        ),
    ],
)
def test_bad_arguments(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


# Transposed convolutions


@pytest.mark.parametrize("size", [[9, 11], [10, 12], [2, 6, 9, 12]])
def test_an_output_size_can_be_asked_for(size: list[int]) -> None:
    torch.manual_seed(0)
    layer = TuckerConvTranspose2d(4, 6, 3, 2, stride=2, **DOUBLE)
    dense, x = layer.to_dense(), torch.randn(2, 4, 4, 5, **DOUBLE)
    close(layer(x, size), dense(x, size))
    optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1), layer, integrator="tdlrt")
    (layer(x, size).sum() + layer(x).square().sum()).backward()
    (dense(x, size).sum() + dense(x).square().sum()).backward()
    expected = dense.weight.grad
    for factor in layer.factors:
        expected = torch.tensordot(expected, factor.detach(), ([0], [0]))
    close(layer.core.grad, expected, 1e-10)
    optimizer.step()


def test_groups_are_factorised_with_a_basis_in_common() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(32, 64, 3, groups=4),
        nn.ConvTranspose2d(64, 32, 3, groups=4),
        nn.Conv2d(32, 32, 3, groups=32),
    ).double()
    summary = plan(model, {"0": 2, "1": 2, "2": gt.Fixed(1)})
    assert [row.shape[:2] for row in summary.layers] == [(64, 8), (64, 8), (32, 1)]
    dense, x = copy.deepcopy(model), torch.randn(1, 32, 8, 8, **DOUBLE)
    small = factorize(model, {"0": 100, "1": 100, "2": 100}, verbose=False)
    assert type(small[0]) is nn.Conv2d  # full ranks would grow
    small = factorize(model, {"0": (12, 8, 3, 3), "1": 2, "2": 1}, verbose=False)
    assert isinstance(small[0], TuckerConv2d)
    assert isinstance(small[1], TuckerConvTranspose2d)
    assert isinstance(small[2], TuckerConv2d)  # depthwise: a kernel in common, and a scale each
    for exact, layer in zip(dense, small, strict=True):
        expected = gt.hosvd(exact.weight.detach(), layer.ranks)
        scale = layer.dense_weight().norm() / gt.norm(expected)
        close(layer.dense_weight(), scale * gt.to_dense(expected), 1e-10)
    assert small(x).shape == dense(x).shape
