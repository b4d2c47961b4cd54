"""Trainings that end alike on any number of processes, and what they do on the way."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import geotucker as gt
from geotucker_torch import (
    TDLRT,
    TuckerModule,
    _lift,
    dense_state_dict,
    densify,
    factorize,
    finalize,
    metrics,
    optimize_for_inference,
    report,
    spectra,
    summary,
)
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


Share: TypeAlias = list[tuple[Tensor, Tensor]]  # of a process in a step, by micro-batch


def in_order(rank: int, world: int, start: int, micro: int = 1) -> Iterator[Share]:
    for step in count(start):
        parts = [[shard(t, part, micro) for t in batch(step)] for part in range(micro)]
        yield [(shard(x, rank, world), shard(y, rank, world)) for x, y in parts]


def shuffled(rank: int, world: int, start: int) -> Iterator[Share]:
    """Draw from a data set, in another order in each epoch, from any step on."""
    x, y = (torch.cat(t)[:-4] for t in zip(*map(batch, range(5)), strict=True))
    data = TensorDataset(x, y)
    sampler: Any = DistributedSampler(data, world, rank, seed=7, drop_last=True)
    loader = DataLoader(data, BATCH // world, sampler=sampler, drop_last=True)
    epoch, taken = divmod(start, len(loader))
    while True:
        sampler.set_epoch(epoch)
        yield from ([(x, y)] for x, y in islice(loader, taken, None))
        epoch, taken = epoch + 1, 0


def train(
    rank: int,
    world: int,
    *,
    wrap: bool | str = True,
    kind: str = "sgd",
    rule: Any = None,
    data: Callable[[int, int, int], Iterator[Share]] = in_order,
    micro: int = 1,
    clip: float | None = None,
    steps: int = 6,
    start: int = 0,
    rebuilt: bool = False,
    load: Callable[[nn.Module, TDLRT], Any] | None = None,
    look: Callable[[nn.Module, TDLRT], Any] | None = None,
    save: Callable[[nn.Module, TDLRT], Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train for a few steps, on this process's share of each batch; seeds differ by process.

    The first of several processes looks at what it has before it takes one of the steps.
    """
    model = network(0 if wrap == "sharded" else rank)  # parts are of one model to begin with
    many = dist.is_initialized()
    outer: Any = model
    if many and wrap == "sharded":
        shard_dense_parts(model)
    elif many and wrap:
        outer = DistributedDataParallel(model, process_group=options.get("process_group"))
    rule = rule or gt.Tolerance(0.2, floor=2, spare=1)
    optimizer = TDLRT(OPTIMIZERS[kind](model), model, rule, **options)
    if rebuilt:  # the first one leaves the second in its group
        optimizer = TDLRT(OPTIMIZERS[kind](model), model, rule, **options)
    if load:
        load(model, optimizer)
    norms = []
    losses: dict[int, float] = {}
    seen: dict[int, list[float]] = {}  # an entry of each sample, which tells it from all others

    def backward(step: int, share: Share) -> None:
        optimizer.zero_grad()
        losses[step], seen[step] = 0.0, []
        for part, (x, y) in enumerate(share, 1):
            last = part == len(share)
            with outer.no_sync() if outer is not model and not last else nullcontext():
                loss = nn.functional.cross_entropy(outer(x), y) / len(share)
                loss.backward()
            losses[step] += loss.item()
            seen[step] += x[:, 0, 0, 0].tolist()

    shares = data(rank, world, start) if micro == 1 else in_order(rank, world, start, micro)
    for step, share in zip(range(start, start + steps), shares, strict=False):
        if options.get("one_pass", True):
            backward(step, share)
            if clip is not None:
                in_parts = many and wrap == "sharded"
                clip_all = clip_both if in_parts else nn.utils.clip_grad_norm_
                norms.append(clip_all(model.parameters(), clip).item())
            if look and many and rank == 0 and step == 3:
                look(model, optimizer)
            optimizer.step()
        else:
            optimizer.step(partial(backward, step, share))
    if save:
        save(model, optimizer)
    return {
        "weights": [
            m.dense_weight().detach() if hasattr(m, "dense_weight") else whole(m.weight)
            for m in model
            if hasattr(m, "bias")
        ],
        "biases": [whole(m.bias) for m in model if getattr(m, "bias", None) is not None],
        "moments": [  # their norms, which are the same in all bases
            whole(t).double().norm()
            for p in model.parameters()
            for t in tree_leaves(optimizer.state.get(p))
            if torch.is_tensor(t)
        ],
        "arrays": [t.detach() for i in (0, 2, 5) for t in (model[i].core, *model[i].factors)],
        "history": optimizer.rank_history,
        "norms": norms,
        "losses": losses,
        "seen": seen,
    }


def shard_dense_parts(model: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """Leave on each process a part of every dense tensor, and the Tucker tensors as they are."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    tucker = {p for m in model.modules() if isinstance(m, TuckerModule) for p in m.parameters()}
    tucker -= {m.bias for m in model.modules() if isinstance(m, TuckerModule)}
    fully_shard(model, mesh=mesh, ignored_params=tucker)


def clip_both(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Clip parts and whole tensors by the norm of all, as the guide does."""
    kinds: tuple[list[Any], ...] = ([], [])
    for parameter in parameters:
        if parameter.grad is not None:
            kinds[isinstance(parameter, DTensor)].append(parameter)
    norms = [nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds]
    norm = torch.hypot(*map(whole, norms))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def drawn(spectra: Sequence[gt.Spectrum]) -> list[tuple[int, ...]]:
    """Draw ranks, by generators whose seeds differ by process."""
    return [tuple(int(torch.randint(1, 1 + min(len(v), 4), ())) for v in s.values) for s in spectra]


def look_at_everything(model: nn.Module, optimizer: TDLRT) -> None:
    """Call on one process what says of a model what it is, runs it, or makes another of it."""
    x, y = batch(99)
    summary(model), spectra(model), metrics(optimizer)
    optimizer.state_dict(), dense_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        report(optimizer, Path(folder) / "report.html")
    densify(copy.deepcopy(model))
    nn.functional.cross_entropy(finalize(model)(x), y).backward()
    optimize_for_inference(model, x[:1], repeats=1, verbose=False)
    nn.functional.cross_entropy(copy.deepcopy(model)(x), y).backward()
    model(x)
    with torch.no_grad():
        model.eval()(x)
    model.train()


TRAININGS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "adam": {"kind": "adam"},
    "alone": {"wrap": False},  # nobody but TDLRT averages
    "whole": {"integrator": "tdlrt"},
    "accumulation": {"micro": 2, "clip": 0.5},
    "whole accumulation": {"integrator": "tdlrt", "micro": 2},
    "alone accumulation": {"wrap": False, "micro": 2, "kind": "adam"},
    "sharded": {"wrap": "sharded", "kind": "adam", "clip": 0.1},
    "two passes": {"one_pass": False},
    "two passes alone": {"one_pass": False, "wrap": False, "kind": "adam"},
    "rebuilt": {"rebuilt": True},
    "seldom": {"basis_every": 3, "clip": 0.1},
    "seldom accumulation": {"basis_every": 2, "micro": 2, "kind": "adam"},
    "budget": {"rule": gt.Budget(parameters=0.35, steps=4), "kind": "adam"},
    "growing": {"rule": gt.Growing(6, every=2, start=3)},
    "random": {"rule": drawn},
    "looked at": {"look": look_at_everything, "micro": 2},
}


def other_bases(folder: Path, rank: int, world: int) -> list[dict[str, Any]]:
    """One process extends bases by other vectors of the same spaces than the first does."""
    augment_all, augment = _lift.augment_all, gt.augment

    def turned(point: gt.TuckerPoint, wide: gt.TuckerPoint | None) -> Any:
        if rank == 0 or wide is None:
            return wide
        factors = [
            torch.cat([u[:, :r], u[:, r:].flip(1)], 1)
            for u, r in zip(wide.factors, point.ranks, strict=True)
        ]
        return gt.TuckerPoint(wide.core, tuple(factors))

    def others(points: Any, directions: Any) -> Any:
        return list(map(turned, points, augment_all(points, directions)))

    _lift.augment_all = others
    gt.augment = lambda point, directions: turned(point, augment(point, directions))
    try:
        return [train(rank, world, **TRAININGS[name]) for name in OTHER_BASES]
    finally:
        _lift.augment_all, gt.augment = augment_all, augment


OTHER_BASES = ("whole", "alone accumulation", "two passes")


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
    """Uses a weight three times, in tied layers, and another not at all if it is told so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(12, 12).double() for _ in range(4))
        self.first, self.twin, self.second, self.unused = layers
        self.twin.weight = self.first.weight
        factorize(self, 3, verbose=False)

    def forward(self, x: Tensor, whole: bool) -> Tensor:
        for layer in (self.first, self.twin, self.first):
            x = torch.tanh(layer(x))
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
        outer(x, True).square().mean().backward()
        outer.zero_grad()  # drops all of it: some leave out next what they have used here
        halves = [rank] if world > 1 else [0, 1]
        losses = [outer(shard(x, half, 2), half == 0).square().mean() for half in halves]
        (sum(losses) / len(halves)).backward()
        optimizer.step()
    assert model.twin.core is model.first.core
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
SCENARIOS |= {f.__name__: f for f in (means, other_bases, other_truncation)}
SCENARIOS["unused_layers"] = lambda folder, rank, world: unused_layers(rank, world)
SCENARIOS["unused_layers alone"] = lambda folder, rank, world: unused_layers(rank, world, False)
