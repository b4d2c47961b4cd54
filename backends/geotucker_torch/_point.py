"""Reading and writing a Tucker tensor that lives in parameters."""

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import geotucker as gt

__all__ = [
    "Shared",
    "orthonormal",
    "own_parameter",
    "read_point",
    "shared_parameter",
    "write_point",
]

Shared: TypeAlias = dict[tuple[nn.Parameter, Any, torch.Size], nn.Parameter]
"""Parameters made of Tucker tensors: by core, which part it is, and shape."""


def own_parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    """Return a parameter with the values of a tensor, in memory of its own."""
    # Contiguous: safetensors saves no views.
    own = tensor.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(own, requires_grad=requires_grad)


def shared_parameter(shared: Shared, core: nn.Parameter, key: Any, tensor: Tensor) -> nn.Parameter:
    """Return the parameter for a matrix or kernel of a Tucker tensor, the same one each time."""
    return shared.setdefault((core, key, tensor.shape), own_parameter(tensor, core.requires_grad))


def read_point(core: nn.Parameter, factors: Iterable[nn.Parameter]) -> gt.TuckerPoint:
    """Return a detached point that shares its memory with the parameters."""
    return gt.TuckerPoint(core.detach(), tuple(factor.detach() for factor in factors))


def write_point(core: nn.Parameter, factors: Iterable[nn.Parameter], point: gt.TuckerPoint) -> None:
    """Put a point of any ranks into parameters; their gradients are dropped.

    The Parameter objects stay and get new memory, so that param groups, the optimizer's state
    and references elsewhere stay valid, and what shares the old memory keeps the old values.
    """
    with torch.no_grad():
        pairs = zip((core, *factors), (point.core, *point.factors), strict=True)
        for parameter, array in pairs:
            parameter.grad = None  # it would have the old shape
            own = array.contiguous()
            if own.untyped_storage().nbytes() != own.nbytes:  # one of a stack
                own = own.clone()
            # Not `parameter.data = ...`, which breaks graphs and optimizer state.
            parameter.set_(own)  # type: ignore[call-overload]
    torch.clear_autocast_cache()  # which goes by the objects


def orthonormal(point: gt.TuckerPoint) -> gt.TuckerPoint:
    """Return the same tensor with orthonormal factors: the point itself if they are already."""
    for factor in point.factors:
        gram = (factor.T @ factor).double()
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        if (gram - identity).abs().max() > 100 * torch.finfo(factor.dtype).eps:
            return gt.orthonormalise(point)
    return point
