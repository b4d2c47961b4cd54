"""What cannot be trained together, and is refused."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from geotucker_torch import TDLRT, distribute

from .meeting import Scenario, join
from .trainings import OPTIMIZERS, batch, network, train


def not_told(folder: Path, rank: int, world: int) -> str:
    """Wrap what is around a factorised model, and forget to say so, or remember."""
    messages = []
    for prepare in (lambda model: model, distribute):
        body = network()
        wrapped = DistributedDataParallel(prepare(nn.Sequential(body, nn.Linear(3, 3).double())))
        optimizer = TDLRT(OPTIMIZERS["sgd"](wrapped), body)
        try:
            for _ in range(2):
                optimizer.zero_grad()
                wrapped(batch(0)[0]).sum().backward()
                optimizer.step()
        except ValueError as error:
            messages.append(str(error))
    (message,) = messages
    return message


def other_models(folder: Path, rank: int, world: int) -> str:
    """Start with unequal models."""
    model = nn.Sequential(*network()[: 6 - rank])
    try:
        TDLRT(OPTIMIZERS["sgd"](model), model)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def other_groups(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Train apart, and ask for groups that cannot be."""
    groups = [dist.new_group([r]) for r in range(world)]
    messages = []
    for group in (groups[1 - rank], "gloo"):
        model = network()
        try:
            TDLRT(OPTIMIZERS["sgd"](model), model, process_group=group)
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    apart = train(0, 1, wrap=False, process_group=groups[rank])
    return {"messages": messages, **apart}


def late(folder: Path, rank: int, world: int) -> str:
    """Build the optimizer before the processes know of one another."""
    model = network()
    optimizer = TDLRT(OPTIMIZERS["sgd"](model), model)
    join(rank, world)
    model(batch(0)[0]).sum().backward()
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


SCENARIOS: dict[str, Scenario] = {
    f.__name__: f for f in (late, not_told, other_groups, other_models)
}
