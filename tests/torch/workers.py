"""Trainings on many processes: a program that tests start, and the same on one process for them.

    python workers.py FOLDER WORLD:SCENARIO ...

It forks processes, so that torch is imported once. What a scenario returns, or the error that it
raises, is left for each process in a file of the folder.
"""

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import geotucker as gt
from geotucker_torch import (
    TDLRT,
    TuckerModule,
    distribute,
    factorize,
    load_checkpoint,
    save_checkpoint,
)
from geotucker_torch._collectives import Part, all_equal, average

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


# On several processes only.


def broken_input(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """NaN comes on one process; the same step goes well afterwards."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = TDLRT(OPTIMIZERS["adam"](model), model, gt.Tolerance(0.1))
    x, y = (shard(t, rank, world) for t in batch(0))
    before = [t.clone() for t in model.state_dict().values()]
    nn.functional.cross_entropy(wrapped(x * torch.nan if rank == 1 else x), y).backward()
    try:
        optimizer.step()
    except gt.NonFiniteError as error:
        message = str(error)
    same = all(map(torch.equal, before, model.state_dict().values()))
    optimizer.zero_grad()
    nn.functional.cross_entropy(wrapped(x), y).backward()
    optimizer.step()
    return {"message": message, "same": same, "ranks": optimizer.ranks}


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


def refused_save(folder: Path, rank: int, world: int) -> tuple[str, ...]:
    """Return what is told before a save, and after one that is refused."""
    model = network()
    optimizer = TDLRT(OPTIMIZERS["sgd"](model), model)
    optimizer.step()
    told = [optimizer.peers.phase]
    try:
        save_checkpoint(folder / "refused_save", model, optimizer, bad=object())
    except TypeError:
        told.append("refused")
    return (*told, optimizer.peers.phase)


def own_errors(folder: Path, rank: int, world: int) -> list[str]:
    """Meet errors of one's own in a step, and in a save of parts on one of the processes."""

    class Scheduler:
        def state_dict(self) -> dict[str, int]:
            if rank == 1:
                raise RuntimeError("its own")
            return {}

    def broken(*_: Any) -> Any:
        raise RuntimeError("its own")

    model, optimizer = trained_parts(PARTS["rule"])
    norm, torch.linalg.vector_norm = torch.linalg.vector_norm, broken
    messages = []
    for call in (
        optimizer.step,
        partial(save_checkpoint, folder / "own errors", model, optimizer, Scheduler()),
    ):
        try:
            call()
        except (RuntimeError, TypeError) as error:
            messages.append(f"{type(error).__name__} {error}")
        torch.linalg.vector_norm = norm
    return messages


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


def means(folder: Path, rank: int, world: int) -> list[Any]:
    """Average tensors of two kinds, some of which some processes do not have."""
    group = dist.group.WORLD
    sent = [
        Part(True, [torch.full((2, 2), 1.0 + rank)]),
        Part(rank == 1, [torch.ones(3, dtype=torch.float64), torch.ones(0)]),
        Part(False, [torch.ones(1)]),
    ]
    return [average(sent, group), all_equal(7, group, CPU), all_equal(rank, group, CPU)]


def saved(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Train half of the way; all processes save, as one file."""

    def save(model: nn.Module, optimizer: TDLRT) -> None:
        save_checkpoint(folder / "checkpoint", model, optimizer, step=3)

    return train(rank, world, kind="adam", steps=3, save=save)


def resumed(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Go on from there, on any number of processes."""

    def load(model: nn.Module, optimizer: TDLRT) -> None:
        assert load_checkpoint(folder / "checkpoint", model, optimizer) == {"step": 3}

    return train(rank, world, kind="adam", start=3, steps=3, load=load)


# Models in parts: a budget whose schedule is under way, so that ranks change before and after.

PARTS: dict[str, Any] = {"wrap": "sharded", "kind": "adam", "rule": TRAININGS["budget"]["rule"]}


def saved_parts(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Train half of the way; all processes save into a folder, twice."""

    def save(model: nn.Module, optimizer: TDLRT) -> None:
        for step in (2, 3):
            save_checkpoint(folder / f"parts of {world}", model, optimizer, step=step, rank=rank)

    return train(rank, world, **PARTS, steps=3, save=save)


def resumed_parts(name: str) -> Callable[[Path, int, int], dict[str, Any]]:
    """Go on from a file or folder, on any number of processes."""

    def scenario(folder: Path, rank: int, world: int) -> dict[str, Any]:
        def load(model: nn.Module, optimizer: TDLRT) -> None:
            assert load_checkpoint(folder / name, model, optimizer)["step"] == 3

        rule = PARTS["rule"] if name != "checkpoint" else None
        return train(rank, world, **{**PARTS, "rule": rule}, start=3, steps=3, load=load)

    return scenario


def broken_part(folder: Path, rank: int, world: int) -> list[str]:
    """NaN is in the gradient of one process's part of a tensor, of one and of the other."""
    messages = []
    for broken in range(world):
        model = network()
        shard_dense_parts(model)
        optimizer = TDLRT(OPTIMIZERS["sgd"](model), model)
        model(batch(0)[0]).sum().backward()
        if rank == broken:
            model[7].weight.grad.to_local()[0] = torch.nan
        try:
            optimizer.step()
        except gt.NonFiniteError as error:
            messages.append(str(error))
    return messages


def trained_parts(rule: Any, **options: Any) -> tuple[nn.Module, TDLRT]:
    """Return a model in parts that has taken a step."""
    made: list[tuple[nn.Module, TDLRT]] = []
    train(
        dist.get_rank(),
        dist.get_world_size(),
        **{**PARTS, "rule": rule, **options},
        steps=1,
        save=lambda *parts: made.append(parts),
    )
    return made[0]


def refused_parts(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Load what is not there, not whole, or not of this model; save where that cannot be."""
    good, messages = folder / "refused", {}
    save_checkpoint(good, *trained_parts(PARTS["rule"]))
    model, optimizer = trained_parts(PARTS["rule"])
    other = nn.Sequential(*network()[:6])
    shard_dense_parts(other)
    unruled = trained_parts(gt.Tolerance(0.2, floor=2, spare=1))

    def damaged(name: str, damage: Callable[[Path], Any]) -> Path:
        copy = folder / name
        if rank == 0:
            shutil.copytree(good, copy)
            damage(copy)
        dist.barrier()
        return copy

    def last_file(copy: Path) -> Path:
        return max(copy.glob("tensors-*/*.distcp"))

    def flip(copy: Path) -> None:
        data = bytearray(last_file(copy).read_bytes())
        data[len(data) // 2] ^= 0xFF
        last_file(copy).write_bytes(data)

    def renumber(copy: Path) -> None:
        index = json.loads((copy / "checkpoint.json").read_text())
        (copy / "checkpoint.json").write_text(json.dumps({**index, "format": 2}))

    cases: dict[str, tuple[Path, tuple[nn.Module, Any]]] = {
        "absent": (folder / "nowhere", (model, optimizer)),
        "absent on one": (good if rank == 0 else folder / "nowhere", (model, optimizer)),
        "no index": (
            damaged("no index", lambda copy: (copy / "checkpoint.json").unlink()),
            (model, optimizer),
        ),
        "no metadata": (
            damaged("no metadata", lambda copy: next(copy.glob("*/.metadata")).unlink()),
            (model, optimizer),
        ),
        "no part": (damaged("no part", lambda copy: last_file(copy).unlink()), (model, optimizer)),
        "cut": (
            damaged("cut", lambda copy: os.truncate(last_file(copy), 100)),
            (model, optimizer),
        ),
        "flipped": (damaged("flipped", flip), (model, optimizer)),
        "newer": (damaged("newer", renumber), (model, optimizer)),
        "other model": (good, (other, None)),
        "other rule": (good, unruled),
    }
    for name, (path, parts) in cases.items():
        tensors = parts[0].state_dict()
        before = [whole(t).clone() for t in tensors.values()], repr(parts[1] and parts[1].ranks)
        places = [t.data_ptr() for t in tensors.values() if not isinstance(t, DTensor)]
        try:
            load_checkpoint(path, *parts)
        except (gt.GeotuckerError, OSError) as error:
            messages[name] = f"{type(error).__name__} {error}"
        tensors = parts[0].state_dict()
        assert all(map(torch.equal, before[0], map(whole, tensors.values())))
        assert repr(parts[1] and parts[1].ranks) == before[1]
        assert [t.data_ptr() for t in tensors.values() if not isinstance(t, DTensor)] == places
    for name, path, extra in (
        ("unknown", good, object() if rank == 1 else 1),
        ("nowhere", folder / "nowhere" / "folder", 1),
        ("file", folder / f"refused_parts.{world}", 1),
    ):
        if rank == 0 and name == "file":
            path.touch()
        try:
            save_checkpoint(path, model, optimizer, extra=extra)
        except (TypeError, OSError) as error:
            messages[f"save {name}"] = f"{type(error).__name__} {error}"
    load_checkpoint(good, model, optimizer)  # and all is well
    return messages


def failed_parts(folder: Path, rank: int, world: int) -> list[Any]:
    """Save where the disk is full, for parts or for the index, or what is old cannot be removed."""
    path, (model, optimizer) = folder / "failed parts", trained_parts(PARTS["rule"])
    save_checkpoint(path, model, optimizer, step=0)
    found = []

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("disk full")

    for holder, name in (
        (FileSystemWriter, "write_data"),  # after a process has written its parts
        (os, "replace"),
        (shutil, "rmtree"),
        (None, ""),
    ):
        call = getattr(holder, name, None)

        def fails(*arguments: Any, name: str = name, call: Any = call, **options: Any) -> Any:
            if name == "write_data" and rank == 0:
                return call(*arguments, **options)
            if name == "rmtree" and options.get("ignore_errors"):
                return None
            return fail()

        if holder is not None:
            setattr(holder, name, fails)
        try:
            save_checkpoint(path, model, optimizer, step=len(found) + 1)
            outcome = "saved"
        except OSError as error:
            outcome = str(error)
        finally:
            if holder is not None:
                setattr(holder, name, call)
        dist.barrier()
        step = load_checkpoint(path)["step"]
        found.append((outcome, step, len(list(path.glob("tensors-*")))))
        dist.barrier()
    return found


def own_parts(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Save and load models in parts on some of the processes, which train on those or on others."""
    shape = torch.arange(world).reshape(world, 1, 1)
    apart = DeviceMesh("cpu", shape, mesh_dim_names=("trainings", "copies", "parts"))
    alone = [dist.new_group([process]) for process in range(world)][rank]
    joint = init_device_mesh("cpu", (1, world), mesh_dim_names=("copies", "parts"))
    found: dict[str, Any] = {}

    def attempt(name: str, mesh: DeviceMesh, group: Any = None, path: Path = folder) -> None:
        model = network(rank if mesh.size() == 1 else 0)
        shard_dense_parts(model, mesh)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if group is not None:
            optimizer = TDLRT(optimizer, model, process_group=group)
        try:
            save_checkpoint(path / name, model, optimizer, who=rank)
            saved = [whole(t).clone() for t in model.state_dict().values()]
            nn.init.zeros_(model[7].weight)
            extra = load_checkpoint(path / name, model, optimizer)
            loaded = [whole(t) for t in model.state_dict().values()]
            found[name] = extra, all(map(torch.equal, saved, loaded))
        except ValueError as error:
            found[name] = str(error)
            try:
                load_checkpoint(path / "joint", model, optimizer)
            except ValueError as error:
                found[name] = found[name], str(error) == found[name]

    own = folder / f"own {rank}"
    own.mkdir()
    attempt("joint", joint)
    attempt("each", apart["parts"], path=own)
    attempt("each alone", apart["parts"], alone, path=own)
    if rank == 0:  # nobody waits for others
        attempt("first", apart["parts"], path=own)
    attempt("trained by all", apart["parts"], dist.group.WORLD)
    attempt("trained by one", joint, alone)
    attempt("unknown", apart["copies", "parts"])
    dist.barrier()
    found["folders"] = sorted(path.name for path in own.iterdir())
    found["refused"] = [name for name in found if (folder / name).exists()]
    return found


# A process is killed.


def killed_with_parts(phase: str) -> Callable[[Path, int, int], str]:
    """Save twice; in the second time a process is killed."""

    def scenario(folder: Path, rank: int, world: int) -> str:
        model, optimizer = trained_parts(PARTS["rule"])
        path = folder / f"parts before {phase}"
        save_checkpoint(path, model, optimizer, step=1)
        if rank == 1 and phase == "parts":
            FileSystemWriter.write_data = die
        if rank == 0 and phase == "index":
            os.replace = die
        try:
            save_checkpoint(path, model, optimizer, step=2)
        except gt.GeotuckerError as error:
            return f"{type(error).__name__} {error}"
        return "nothing was raised"

    return scenario


def die(*_: Any, **__: Any) -> Any:
    time.sleep(0.2)  # what was told has arrived, however busy the machine
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in(phase: str) -> Callable[[Path, int, int], str]:
    """Train until a process is killed: the first one while it saves, else the last one."""

    def scenario(folder: Path, rank: int, world: int) -> str:
        model = network()
        outer = DistributedDataParallel(model) if phase == "backward" else model
        victim = rank == (0 if phase == "checkpoint" else world - 1)
        try:
            if victim and phase == "start":
                dist.all_gather_object = die
            optimizer = TDLRT(OPTIMIZERS["sgd"](model), model, gt.Tolerance(0.1))
            for step in range(4):
                optimizer.zero_grad()
                dying = victim and step == 2
                if dying and phase == "forward":
                    model[2].register_forward_hook(die)
                if dying and phase == "backward":  # between two layers
                    model[3].register_full_backward_pre_hook(die)
                x, y = (shard(t, rank, world) for t in batch(step))
                loss = nn.functional.cross_entropy(outer(x), y)
                if dying and phase == "synchronisation":
                    dist.all_reduce = die
                loss.backward()
                if dying and phase == "step":
                    optimizer.wrapped.step = die
                if dying and phase == "truncation":
                    gt.truncate = die
                optimizer.step()
                if dying and phase == "checkpoint":
                    os.replace = die
                if step in (1, 2):
                    save_checkpoint(folder / f"before {phase}", model, optimizer, step=step)
        except gt.GeotuckerError as error:
            return f"{type(error).__name__} {error}"
        return "nothing was raised"

    return scenario


def killed_with_the_store(folder: Path, rank: int, world: int) -> str:
    """Lose the process that keeps what processes have told."""
    if rank == 0:
        store = publish_store(folder / "port")
    else:
        store = dist.TCPStore("127.0.0.1", read_port(folder / "port"))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    model = network()
    optimizer = TDLRT(OPTIMIZERS["sgd"](model), model)
    try:
        for step in range(2):
            if rank == 0 and step == 1:
                model[2].register_forward_hook(die)
            optimizer.zero_grad()
            model(batch(0)[0]).sum().backward()
            optimizer.step()
    except gt.GeotuckerError as error:
        return f"{type(error).__name__} {error}"
    return "nothing was raised"


PHASES = ("start", "forward", "backward", "synchronisation", "step", "truncation", "checkpoint")

TIMEOUT = timedelta(seconds=20)
STORE: dict[str, Any] = {}  # where processes meet: the port, and a name for each job


def join(rank: int, world: int) -> None:
    """Meet the others, as under torchrun, at a store that another process keeps."""
    store = dist.TCPStore("127.0.0.1", STORE["port"], timeout=TIMEOUT)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(STORE["job"], store),
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )


SCENARIOS: dict[str, Callable[[Path, int, int], Any]] = {
    name: lambda folder, rank, world, options=options: train(rank, world, **options)
    for name, options in TRAININGS.items()
}
SCENARIOS |= {f"killed in {phase}": killed_in(phase) for phase in PHASES}
SCENARIOS |= {
    f.__name__: f
    for f in (
        broken_input,
        broken_part,
        failed_parts,
        killed_with_the_store,
        late,
        means,
        not_told,
        other_groups,
        other_models,
        other_truncation,
        own_errors,
        own_parts,
        refused_parts,
        refused_save,
        resumed,
        saved,
        saved_parts,
    )
}
SCENARIOS |= {f"killed with {phase}": killed_with_parts(phase) for phase in ("parts", "index")}
SCENARIOS |= {
    f"resumed {name}": resumed_parts(name) for name in ("parts of 1", "parts of 2", "checkpoint")
}
SCENARIOS["unused_layers"] = lambda folder, rank, world: unused_layers(rank, world)
SCENARIOS["unused_layers alone"] = lambda folder, rank, world: unused_layers(rank, world, False)


def work(folder: Path, rank: int, world: int, name: str) -> None:
    """Run a scenario in a process of its own, and leave its result in a file."""
    try:
        if name not in ("late", "killed_with_the_store"):
            join(rank, world)
        result = SCENARIOS[name](folder, rank, world)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, folder / f"{name}.{world}.{rank}")
    os._exit(0)


def keep_store(folder: Path) -> int:
    """Keep the store at which others meet, in a process of its own; return its id.

    A store has threads, and who has threads cannot fork others that are sure to run.
    """
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        store = publish_store(folder / "port of all")
        while store and os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)
    STORE["port"] = read_port(folder / "port of all")
    return child


def publish_store(path: Path) -> dist.TCPStore:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    path.with_suffix(".part").write_text(str(store.port))
    path.with_suffix(".part").rename(path)
    return store


def read_port(path: Path) -> int:
    while not path.exists():
        time.sleep(0.01)
    return int(path.read_text())


def main(folder: Path, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    keeper = keep_store(folder)
    for job in jobs:
        STORE["job"] = job
        number, name = job.split(":")
        children = []
        for rank in range(int(number)):
            child = os.fork()
            if child == 0:
                work(folder, rank, int(number), name)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
    os.kill(keeper, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
