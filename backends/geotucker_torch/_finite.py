"""NaN and infinity, looked for with one question to the device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

import geotucker as gt

__all__ = ["all_finite", "check_finite"]


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Tell whether every entry of every tensor is finite."""
    # A largest magnitude is not finite exactly if an entry is not; a sum may overflow.
    largest = [t.detach().abs().max().double() for t in tensors if t.numel()]
    if not largest:
        return True
    device = largest[0].device
    return bool(torch.isfinite(torch.stack([t.to(device) for t in largest])).all())


def check_finite(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise NonFiniteError, which names the first culprit, unless all tensors are finite.

    Parameters
    ----------
    named : iterable of (str, Tensor)
        Tensors, dense or sparse, with names for the message.

    Raises
    ------
    geotucker.NonFiniteError
        If there is NaN or infinity.
    """
    tensors = [(name, t.coalesce().values() if t.is_sparse else t) for name, t in named]
    if all_finite([t for _, t in tensors]):
        return
    name = next(name for name, t in tensors if not bool(torch.isfinite(t).all()))
    raise gt.NonFiniteError(
        f"{name}: expected finite numbers, got NaN or infinity. The step was undone; "
        "the usual causes are a learning rate that is too large and input that is not finite"
    )
