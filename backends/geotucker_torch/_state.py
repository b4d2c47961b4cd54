"""The wrapped optimizer's state for a core, carried through basis change and truncation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geotucker._moments import lift, rotate

__all__ = ["lift_state", "rotate_state"]

# Second moments of torch.optim, which have no exact transport (see geotucker._moments).
_SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf"}
# Bound to coordinates: means nothing in other bases.
_COORDINATE = {"step_size"}


def lift_state(state: dict[str, Any], shape: Sequence[int], ranks: Sequence[int]) -> dict[str, Any]:
    """Return the state for a core that was padded from `shape` to `ranks`.

    State that is shaped like the core is padded with zeros, scalars stay, and if any tensor
    has another shape the whole state is reset: it cannot be carried.
    """
    return _carried(state, shape, lambda _, moment: lift(moment, ranks))


def rotate_state(
    state: dict[str, Any], shape: Sequence[int], rotations: Sequence[Tensor]
) -> dict[str, Any]:
    """Return the state for a core of `shape` that was rotated by the P_i of a truncation.

    Second moments (known by name) use the squared entries of the P_i, all else transforms
    like the core.
    """
    return _carried(state, shape, lambda key, m: rotate(m, rotations, squared=key in _SECOND))


def _carried(
    state: dict[str, Any], shape: Sequence[int], carry: Callable[[str, Tensor], Tensor]
) -> dict[str, Any]:
    carried: dict[str, Any] = {}
    for key, value in state.items():
        if not torch.is_tensor(value) or value.dim() == 0:
            carried[key] = value
        elif tuple(value.shape) == tuple(shape) and key not in _COORDINATE:
            carried[key] = carry(key, value).contiguous()
        else:
            return {}
    return carried
