"""Plain modules in place of tensorised layers, made by torch.fx.

No chain of layers of torch permutes the axes of activations. A module of torch.fx does, and like
such a chain it needs nothing of this package: what is saved is its generated code.
"""

import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ._maps import modes_turned
from ._plan import Contraction
from ._point import Shared, own_parameter, shared_parameter
from ._tensor_embedding import TuckerTensorEmbedding
from ._tensor_linear import TuckerTensorLinear
from ._tensor_lookup import multi_index, row_products
from ._tensor_module import TensorModule
from ._tensor_plan import Projected, operations
from ._tensorised import kernel

__all__ = ["plain_operations", "plain_parameters", "plain_tensor"]


@torch.no_grad()
def plain_tensor(
    layer: TensorModule, order: Contraction, shared: Shared | None = None
) -> nn.Module:
    """Build what computes the layer's map with all factors of a side projected, or folded.

    Factors of complete bases are always folded, as they do not make the kernel larger; but for
    those in which rows are looked up. The gradient of what is looked up at a ``padding_idx`` is
    stopped; ``scale_grad_by_freq``, which no plain operation has, counts in a dense layer only.

    Parameters
    ----------
    layer : TuckerTensorLinear or TuckerTensorEmbedding
    order : Contraction
    shared : dict, optional
        As for `plain_module`.

    Returns
    -------
    nn.Module
        A layer of the dense type, or a ``torch.fx.GraphModule`` with the parameters ``project_i``,
        ``kernel``, ``spread_i`` and ``bias``; in the layer's mode, sharing nothing with it.

    Examples
    --------
    >>> layer = TuckerTensorLinear((4, 5), (5, 6), ranks=2)
    >>> module = plain_tensor(layer, Contraction(True, True))
    >>> [name for name, _ in module.named_parameters()]
    ['project_0', 'project_1', 'kernel', 'spread_0', 'spread_1', 'bias']
    """
    projected = _projected(layer, order)
    shared = {} if shared is None else shared
    if not any(projected):
        dense: Any = layer.to_dense()
        dense.weight = shared_parameter(shared, layer.core, projected, dense.weight)
        return cast("nn.Module", dense)
    kind: Any = _Lookup if isinstance(layer, TuckerTensorEmbedding) else _Chain
    return fx.symbolic_trace(kind(layer, projected, shared)).train(layer.training)


def plain_parameters(layer: TensorModule, order: Contraction) -> int:
    """Count the weights of `plain_tensor`."""
    modes = list(zip(layer.shape, layer.ranks, _projected(layer, order), strict=True))
    entries = math.prod(r if meets else n for n, r, meets in modes)
    return entries + sum(n * r for n, r, meets in modes if meets)


def plain_operations(layer: TensorModule, order: Contraction) -> int:
    """Count the multiply-adds of `plain_tensor` for one input."""
    return operations(layer.sizes_for(1), _projected(layer, order), folding=False)


def _projected(layer: TensorModule, order: Contraction) -> Projected:
    rows, columns = modes_turned(layer.map, order)
    modes = zip(layer.shape, layer.ranks, strict=True)
    incomplete = [r < n for n, r in modes]
    if rows and isinstance(layer, TuckerTensorEmbedding):  # one index for each mode
        incomplete[: layer.row_modes] = [True] * layer.row_modes
    sides = [rows] * layer.row_modes + [columns] * len(layer.split[1])
    return tuple(meets and thin for meets, thin in zip(sides, incomplete, strict=True))


class _Plain(nn.Module):
    """The map as torch.fx traces it: its loops and conditions do not depend on the input.

    Parameters that are the same matrices of the same tensor are shared.
    """

    def __init__(self, layer: TensorModule, projected: Projected, shared: Shared) -> None:
        super().__init__()
        self.projected, self.row_modes = projected, layer.row_modes
        self._own = partial(shared_parameter, shared, layer.core)
        bias = layer.bias
        self.bias = None if bias is None else own_parameter(bias, bias.requires_grad)

    def _named(self, name: str, factors: list[Tensor], first: int, turned: bool) -> list[str]:
        """Register the factors that are projected; return a name for each, empty for the others."""
        names = [""] * len(factors)
        for i, factor in enumerate(factors):
            mode = first + i
            if self.projected[mode]:
                names[i] = f"{name}_{i}"
                key, matrix = ((mode, "T"), factor.t()) if turned else (mode, factor)
                self.register_parameter(names[i], self._own(key, matrix))
        return names

    def _apply_all(self, t: Tensor, names: list[str]) -> Tensor:
        """Apply matrices to the last axes; empty names stand for none."""
        for i, name in enumerate(names):
            if name:
                axis = i - len(names)
                t = nn.functional.linear(t.movedim(axis, -1), getattr(self, name))
                t = t.movedim(-1, axis)
        return t


class _Chain(_Plain):
    """That of a linear layer."""

    def __init__(self, layer: TuckerTensorLinear, projected: Projected, shared: Shared) -> None:
        super().__init__(layer, projected, shared)
        factors, rows = list(layer.factors), layer.row_modes
        self.in_shape = layer.in_shape
        folded = kernel(layer.core, factors, projected)
        self.kernel_shape = folded.shape[:rows]
        self.project = self._named("project", factors[rows:], rows, turned=True)
        self.kernel = self._own(projected, folded.flatten(0, rows - 1).flatten(1))
        self.spread = self._named("spread", factors[:rows], 0, turned=False)

    def forward(self, x: Tensor) -> Tensor:
        t = x.unflatten(-1, self.in_shape)
        t = self._apply_all(t, self.project).flatten(-len(self.in_shape))
        t = nn.functional.linear(t, self.kernel).unflatten(-1, self.kernel_shape)
        t = self._apply_all(t, self.spread).flatten(-len(self.kernel_shape))
        return t if self.bias is None else t + self.bias


class _Lookup(_Plain):
    """That of an embedding."""

    def __init__(self, layer: TuckerTensorEmbedding, projected: Projected, shared: Shared) -> None:
        super().__init__(layer, projected, shared)
        factors, rows = list(layer.factors), layer.row_modes
        self.row_shape, self.padding_idx = layer.row_shape, layer.padding_idx
        folded = kernel(layer.core, factors, projected)
        self.kernel_shape = folded.shape[rows:]
        matrix = folded.flatten(0, rows - 1).flatten(1)
        self.project = self._named("project", factors[:rows], 0, turned=False)
        self.kernel = (
            self._own((projected, "T"), matrix.t())
            if all(self.project)
            else self._own(projected, matrix)
        )
        self.spread = self._named("spread", factors[rows:], rows, turned=False)

    def forward(self, x: Tensor) -> Tensor:
        if all(self.project):
            rows = [getattr(self, name) for name in self.project]
            t = row_products(multi_index(x, self.row_shape), rows)
            t = nn.functional.linear(t, self.kernel)
        else:
            t = nn.functional.embedding(x, self.kernel)
        t = self._apply_all(t.unflatten(-1, self.kernel_shape), self.spread)
        t = t.flatten(-len(self.kernel_shape))
        if self.padding_idx is None:
            return t
        return torch.where((x == self.padding_idx).unsqueeze(-1), t.detach(), t)
