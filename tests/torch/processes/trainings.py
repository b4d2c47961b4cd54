"""Trainings that end alike on any number of processes, and what they do on the way."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import geotucker as gt
from geotucker_torch import TDLRT, TuckerModule, factorize
from geotucker_torch._collectives import Part, all_equal, average

from .meeting import Scenario

CPU = torch.device("cpu")
BATCH = 8  # of all processes together


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32, 12),
        nn.Tanh(),
        nn.Linear(12, 3),
    ).double()
    ranks = {"0": (3, 2, 2, 2), "2": (4, 3, 2, 2), "5": 4}
    return factorize(model, ranks, verbose=False)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 2, 6, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (BATCH,), generator=generator)


def shard(tensor: Tensor, rank: int, world: int) -> Tensor:
    size = len(tensor) // world
    return tensor[rank * size : (rank + 1) * size]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
    "adam": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}


def train(
    rank: int,
    world: int,
    *,
    wrap: bool | str = True,
    kind: str = "sgd",
    rule: Any = None,
    micro: int = 1,
    clip: float | None = None,
    steps: int = 6,
    start: int = 0,
    rebuilt: bool = False,
    load: Callable[[nn.Module, TDLRT], Any] | None = None,
    save: Callable[[nn.Module, TDLRT], Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train for a few steps, on this process's share of each batch; seeds differ by process."""
    model = network(0 if wrap == "sharded" else rank)  # parts are of one model to begin with
    many = dist.is_initialized()
    outer: Any = model
    if many and wrap == "sharded":
        shard_dense_parts(model)
    elif many and wrap:
        outer = DistributedDataParallel(model)
    rule = rule or gt.Tolerance(0.2, floor=2, spare=1)
    optimizer = TDLRT(OPTIMIZERS[kind](model), model, rule, **options)
    if rebuilt:  # the first one leaves the second in its group
        optimizer = TDLRT(OPTIMIZERS[kind](model), model, rule, **options)
    if load:
        load(model, optimizer)
    norms = []

    def backward(step: int) -> None:
        optimizer.zero_grad()
        for part in range(micro):
            x, y = (shard(shard(t, part, micro), rank, world) for t in batch(step))
            last = part == micro - 1
            with outer.no_sync() if outer is not model and not last else nullcontext():
                (nn.functional.cross_entropy(outer(x), y) / micro).backward()

    for step in range(start, start + steps):
        if options.get("one_pass", True):
            backward(step)
            if clip is not None:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
            optimizer.step()
        else:
            optimizer.step(partial(backward, step))
    if save:
        save(model, optimizer)
    return {
        "weights": [
            m.dense_weight().detach() if hasattr(m, "dense_weight") else whole(m.weight)
            for m in model
            if hasattr(m, "bias")
        ],
        "biases": [whole(m.bias) for m in model if getattr(m, "bias", None) is not None],
        "arrays": [t.detach() for i in (0, 2, 5) for t in (model[i].core, *model[i].factors)],
        "history": optimizer.rank_history,
        "norms": norms,
    }


def shard_dense_parts(model: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """Leave on each process a part of every dense tensor, and the Tucker tensors as they are."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    tucker = {p for m in model.modules() if isinstance(m, TuckerModule) for p in m.parameters()}
    tucker -= {m.bias for m in model.modules() if isinstance(m, TuckerModule)}
    fully_shard(model, mesh=mesh, ignored_params=tucker)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


TRAININGS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "adam": {"kind": "adam"},
    "alone": {"wrap": False},  # nobody but TDLRT averages
    "whole": {"integrator": "tdlrt"},
    "accumulation": {"micro": 2, "clip": 0.5},
    "whole accumulation": {"integrator": "tdlrt", "micro": 2},
    "alone accumulation": {"wrap": False, "micro": 2, "kind": "adam"},
    "sharded": {"wrap": "sharded", "kind": "adam"},
    "two passes": {"one_pass": False},
    "two passes alone": {"one_pass": False, "wrap": False, "kind": "adam"},
    "rebuilt": {"rebuilt": True},
    "seldom": {"basis_every": 3, "clip": 0.1},
    "budget": {"rule": gt.Budget(parameters=0.35, steps=4), "kind": "adam"},
}


def other_truncation(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """One process finds other singular vectors, and other ranks, than the first does."""
    truncate = gt.truncate

    def other(points: Any, rule: Any, facts: Any = None) -> Any:
        if rank == 0:
            return truncate(points, rule, facts)
        cuts = truncate(points, gt.Fixed(3), facts)
        return [
            cut._replace(
                point=gt.TuckerPoint(
                    -cut.point.core, (-cut.point.factors[0], *cut.point.factors[1:])
                )
            )
            for cut in cuts
        ]

    gt.truncate = other
    try:
        return train(rank, world, kind="adam")
    finally:
        gt.truncate = truncate


class Sometimes(nn.Module):
    """Uses one layer twice, and another not at all if it is told so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.first, self.second, self.unused = (layer.double() for layer in layers)
        factorize(self, 3, verbose=False)

    def forward(self, x: Tensor, whole: bool) -> Tensor:
        x = torch.tanh(self.first(torch.tanh(self.first(x))))
        return self.second(x) if whole else x


def unused_layers(rank: int, world: int, wrap: bool = True) -> dict[str, Any]:
    """Train where the odd halves of a batch leave a layer out, and all of them another."""
    model = Sometimes()
    outer: Any = model
    if dist.is_initialized() and wrap:
        outer = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = TDLRT(OPTIMIZERS["sgd"](model), model, gt.Tolerance(0.1, floor=2))
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).double()
        halves = [rank] if world > 1 else [0, 1]
        losses = [outer(shard(x, half, 2), half == 0).square().mean() for half in halves]
        (sum(losses) / len(halves)).backward()
        optimizer.step()
    assert model.unused.core.grad is None and model.unused.ranks == (3, 3)
    return {"state": dict(model.state_dict()), "weight": model.first.dense_weight().detach()}


def means(folder: Path, rank: int, world: int) -> list[Any]:
    """Average tensors of two kinds, some of which some processes do not have."""
    group = dist.group.WORLD
    sent = [
        Part(True, [torch.full((2, 2), 1.0 + rank)]),
        Part(rank == 1, [torch.ones(3, dtype=torch.float64), torch.ones(0)]),
        Part(False, [torch.ones(1)]),
    ]
    return [average(sent, group), all_equal(7, group, CPU), all_equal(rank, group, CPU)]


SCENARIOS: dict[str, Scenario] = {
    name: lambda folder, rank, world, options=options: train(rank, world, **options)
    for name, options in TRAININGS.items()
}
SCENARIOS |= {f.__name__: f for f in (means, other_truncation)}
SCENARIOS["unused_layers"] = lambda folder, rank, world: unused_layers(rank, world)
SCENARIOS["unused_layers alone"] = lambda folder, rank, world: unused_layers(rank, world, False)
