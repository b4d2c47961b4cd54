"""What a training has to tell the loggers of trainers: ranks, sizes, times."""

import math
from typing import Any

from ._optimizer import TDLRT
from ._slots import find_slots

__all__ = ["metrics"]


def metrics(optimizer: Any) -> dict[str, float]:
    """Return ranks, sizes and times of a training as one flat dict of numbers, for any logger.

    Parameters
    ----------
    optimizer : TDLRT
        Or what a trainer has wrapped it in, such as Accelerate's or Lightning's optimizers.

    Returns
    -------
    dict of str to float
        ``ranks/LAYER/MODE`` for every mode of every Tucker tensor; ``parameters`` of the whole
        model; ``compression``, the share of the dense model's parameters that it does without; and,
        after a step, ``seconds/PART`` for the parts of `TDLRT.seconds`.

    Raises
    ------
    TypeError
        If `optimizer` is none.

    Examples
    --------
    >>> import torch
    >>> from geotucker_torch import TDLRT, factorize, metrics
    >>> model = factorize(torch.nn.Sequential(torch.nn.Linear(30, 10)), 4, verbose=False)
    >>> metrics(TDLRT(torch.optim.SGD(model.parameters(), lr=0.1), model))
    {'ranks/0/out': 4, 'ranks/0/in': 4, 'parameters': 186, 'compression': 0.4}
    """
    tdlrt = _unwrapped(optimizer)
    slots = find_slots(tdlrt.model)
    numbers: dict[str, float] = {}
    saved = 0
    for slot in slots:
        point = slot.settled_point
        names = map(str, range(point.order)) if slot.layer is None else slot.layer.mode_names
        where = f"ranks/{slot.name}".rstrip("/")
        numbers |= {f"{where}/{n}": r for n, r in zip(names, point.ranks, strict=True)}
        saved += math.prod(point.shape) - point.size
    lifted = sum(slot.point.size - slot.settled_point.size for slot in slots)
    parameters = sum(p.numel() for p in tdlrt.model.parameters()) - lifted
    numbers |= {"parameters": parameters, "compression": saved / (parameters + saved)}
    return numbers | {f"seconds/{part}": s for part, s in tdlrt.seconds.items()}


def _unwrapped(optimizer: Any) -> TDLRT:
    # Lightning's wrapper is of a class made of its own and TDLRT, with copies of attributes.
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, TDLRT):
        raise TypeError(f"optimizer: expected a TDLRT, got {type(optimizer).__name__}")
    return inner
