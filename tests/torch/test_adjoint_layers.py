"""Embeddings and transposed convolutions: as their dense layers, and in one pass as in two."""

import copy
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import geotucker as gt
from geotucker.testing import check_orthonormal
from geotucker_torch import (
    TDLRT,
)
from geotucker_torch._contract import contract
from geotucker_torch._plan import CONTRACTIONS

from .cases import embeddings, transposed

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


def steps(model: Any, x: Tensor, *, one_pass: bool, rule: Any, number: int = 3) -> Any:
    model = copy.deepcopy(model)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer = TDLRT(sgd, model, rule, integrator="tdlrt", one_pass=one_pass)

    def closure() -> Tensor:
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


@given(either, st.sampled_from([None, gt.Tolerance(0.1), gt.Fixed(2)]))
def test_one_pass_is_two(case: Any, rule: Any) -> None:
    layer, x = case
    assume(x.numel())
    one, two = (steps(layer, x, one_pass=flag, rule=rule) for flag in (True, False))
    assert one.ranks == two.ranks
    close(one.dense_weight(), two.dense_weight(), 1e-12)
    if layer.bias is not None:
        close(one.bias, two.bias, 1e-12)
