"""Plain modules in place of tensorised layers, made by torch.fx.

No chain of layers of torch permutes the axes of activations. A module of torch.fx does, and like
such a chain it needs nothing of this package: what is saved is its generated code.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ._plan import Contraction
from ._point import Shared, own_parameter, shared_parameter
from ._tensor_linear import TuckerTensorLinear
from ._tensor_plan import Projected, TensorSizes, operations
from ._tensorised import kernel

__all__ = ["plain_operations", "plain_parameters", "plain_tensor_linear"]


@torch.no_grad()
def plain_tensor_linear(
    layer: TuckerTensorLinear, order: Contraction, shared: Shared | None = None
) -> nn.Module:
    """Build what computes the layer's map with all factors of a side projected, or folded.

    Factors of complete bases are always folded, as they do not make the kernel larger.

    Parameters
    ----------
    layer : TuckerTensorLinear
    order : Contraction
    shared : dict, optional
        As for `plain_module`.

    Returns
    -------
    nn.Module
        An ``nn.Linear``, or a ``torch.fx.GraphModule`` with the parameters ``project_i``,
        ``kernel``, ``spread_i`` and ``bias``; in the layer's mode, sharing nothing with it.

    Examples
    --------
    >>> layer = TuckerTensorLinear((4, 5), (5, 6), ranks=2)
    >>> module = plain_tensor_linear(layer, Contraction(True, True))
    >>> [name for name, _ in module.named_parameters()]
    ['project_0', 'project_1', 'kernel', 'spread_0', 'spread_1', 'bias']
    """
    projected = _projected(layer, order)
    shared = {} if shared is None else shared
    if not any(projected):
        dense: Any = layer.to_dense()
        dense.weight = shared_parameter(shared, layer.core, projected, dense.weight)
        return cast("nn.Module", dense)
    return fx.symbolic_trace(_Chain(layer, projected, shared)).train(layer.training)


def plain_parameters(layer: TuckerTensorLinear, order: Contraction) -> int:
    """Count the weights of `plain_tensor_linear`."""
    modes = list(zip(layer.shape, layer.ranks, _projected(layer, order), strict=True))
    entries = math.prod(r if meets else n for n, r, meets in modes)
    return entries + sum(n * r for n, r, meets in modes if meets)


def plain_operations(layer: TuckerTensorLinear, order: Contraction) -> int:
    """Count the multiply-adds of `plain_tensor_linear` for one input."""
    ranks, outputs = layer.ranks, layer.out_modes
    sizes = TensorSizes(layer.out_shape, layer.in_shape, ranks[:outputs], ranks[outputs:], 1)
    return operations(sizes, _projected(layer, order), folding=False)


def _projected(layer: TuckerTensorLinear, order: Contraction) -> Projected:
    sides = [order.project_output] * layer.out_modes + [order.project_input] * len(layer.in_shape)
    ranks = zip(sides, layer.shape, layer.ranks, strict=True)
    return tuple(meets and r < n for meets, n, r in ranks)


class _Chain(nn.Module):
    """The map as torch.fx traces it: its loops and conditions do not depend on the input."""

    def __init__(self, layer: TuckerTensorLinear, projected: Projected, shared: Shared) -> None:
        super().__init__()
        self.in_shape, self.outputs, core = layer.in_shape, layer.out_modes, layer.core
        folded = kernel(layer.core, list(layer.factors), projected)
        self.kernel_shape = folded.shape[: self.outputs]
        matrix = folded.flatten(0, self.outputs - 1).flatten(1)
        self.kernel = shared_parameter(shared, core, projected, matrix)
        bias = layer.bias
        self.bias = None if bias is None else own_parameter(bias, bias.requires_grad)
        self.spread, self.project = [""] * self.outputs, [""] * len(self.in_shape)
        for mode, (factor, meets) in enumerate(zip(layer.factors, projected, strict=True)):
            if not meets:
                continue
            if mode < self.outputs:
                names, i, key, matrix = self.spread, mode, mode, factor
            else:
                names, i, key, matrix = self.project, mode - self.outputs, (mode, "T"), factor.t()
            names[i] = f"{'spread' if names is self.spread else 'project'}_{i}"
            self.register_parameter(names[i], shared_parameter(shared, core, key, matrix))

    def forward(self, x: Tensor) -> Tensor:
        t = x.unflatten(-1, self.in_shape)
        t = self._apply_all(t, self.project).flatten(-len(self.in_shape))
        t = nn.functional.linear(t, self.kernel).unflatten(-1, self.kernel_shape)
        t = self._apply_all(t, self.spread).flatten(-self.outputs)
        return t if self.bias is None else t + self.bias

    def _apply_all(self, t: Tensor, names: list[str]) -> Tensor:
        """Apply matrices to the last axes; empty names stand for none."""
        for i, name in enumerate(names):
            if name:
                axis = i - len(names)
                t = nn.functional.linear(t.movedim(axis, -1), getattr(self, name))
                t = t.movedim(-1, axis)
        return t
