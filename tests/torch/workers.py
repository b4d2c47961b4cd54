"""Trainings on many processes: a program that tests start, and the same on one process for them.

    python workers.py FOLDER RANK WORLD SECONDS SCENARIO ...

Each scenario leaves what it returns in a file of the folder.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import geotucker as gt
from geotucker_torch import TDLRT, factorize

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
    wrap: bool = True,
    kind: str = "sgd",
    rule: Any = None,
    micro: int = 1,
    clip: float | None = None,
    steps: int = 6,
    start: int = 0,
    load: Callable[[nn.Module, TDLRT], Any] | None = None,
    save: Callable[[nn.Module, TDLRT], Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train for a few steps, on this process's share of each batch; seeds differ by process."""
    model = network(rank)
    many = dist.is_initialized()
    outer: Any = DistributedDataParallel(model) if many and wrap else model
    optimizer = TDLRT(OPTIMIZERS[kind](model), model, rule or gt.Tolerance(0.1, floor=2), **options)
    if load:
        load(model, optimizer)
    norms = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        for part in range(micro):
            x, y = (shard(t, part, micro) for t in batch(step))
            x, y = (shard(t, rank, world) for t in (x, y))
            last = part == micro - 1
            local = outer.no_sync() if many and wrap and not last else nullcontext()
            with local:
                (nn.functional.cross_entropy(outer(x), y) / micro).backward()
        if clip is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
    if save:
        save(model, optimizer)
    return {
        "weights": [
            m.dense_weight().detach() if hasattr(m, "dense_weight") else m.weight.detach()
            for m in model
            if hasattr(m, "bias")
        ],
        "biases": [m.bias.detach() for m in model if getattr(m, "bias", None) is not None],
        "points": [t.clone() for i in (0, 2, 5) for t in model[i].point.core[None]],
        "history": optimizer.rank_history,
        "norms": norms,
    }


TRAININGS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "adam": {"kind": "adam"},
    "alone": {"wrap": False},  # nobody but TDLRT averages
    "whole": {"integrator": "tdlrt"},
    "accumulation": {"micro": 2, "clip": 0.5},
    "whole accumulation": {"integrator": "tdlrt", "micro": 2},
    "alone accumulation": {"wrap": False, "micro": 2, "kind": "adam"},
    "seldom": {"basis_every": 3, "clip": 0.1},
    "budget": {"rule": gt.Budget(parameters=0.35, steps=4), "kind": "adam"},
}


def main(folder: Path, rank: int, world: int, seconds: float, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=seconds),
    )
    for name in names:
        if name in TRAININGS:
            result: Any = train(rank, world, **TRAININGS[name])
        else:
            result = SCENARIOS[name](folder, rank, world)
        torch.save(result, folder / f"{name}-{rank}")
    dist.destroy_process_group()


SCENARIOS: dict[str, Callable[[Path, int, int], Any]] = {}

if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]), float(sys.argv[4]), sys.argv[5:])
