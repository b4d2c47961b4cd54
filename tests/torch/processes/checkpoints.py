"""What is saved, and resumed by other numbers of processes; what cannot be, on all of them."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import geotucker as gt
from geotucker_torch import TDLRT, load_checkpoint, save_checkpoint

from .meeting import Scenario
from .trainings import (
    OPTIMIZERS,
    TRAININGS,
    batch,
    network,
    shard_dense_parts,
    shuffled,
    train,
    whole,
)

# Rules that remember: where a schedule is, what ranks were before, how far growth has come. They
# are saved amid an epoch of four steps.

ELASTIC: dict[str, Any] = {
    "kind": "adam",
    "rule": {
        "0": gt.Budget(parameters=0.4, start=0.9, steps=5),
        "2": gt.Growing(6, every=2, start=3),
        "5": gt.Tolerance(0.6, hysteresis=0.5),
    },
    "data": shuffled,
}


def saved(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Train for a while; all processes save, as one file."""

    def save(model: nn.Module, optimizer: TDLRT) -> None:
        save_checkpoint(folder / "checkpoint", model, optimizer, step=3)

    return train(rank, world, **ELASTIC, steps=3, save=save)


def resumed(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Go on from there, on any number of processes."""

    def load(model: nn.Module, optimizer: TDLRT) -> None:
        assert load_checkpoint(folder / "checkpoint", model, optimizer) == {"step": 3}

    return train(rank, world, **ELASTIC, start=3, steps=6, load=load)


def other_files(folder: Path, rank: int, world: int) -> list[tuple[str, bool]]:
    """Load from disks of one's own: where one has no file, the same, and that of another moment."""
    model = network()
    optimizer = TDLRT(OPTIMIZERS["adam"](model), model)
    disk, found = folder / f"disk of {rank}", []
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)[0]).square().sum().backward()
        optimizer.step()
        save_checkpoint(disk, model, optimizer, step=step)
        if rank == 0 and step == 1:
            shutil.copy(disk, folder / "disk of 1")
        dist.barrier()
        nn.init.ones_(model[7].weight)
        try:
            message = str(load_checkpoint(disk, model, optimizer))
        except (gt.GeotuckerError, OSError) as error:
            message = f"{type(error).__name__} {error}"
        found.append((message, bool((model[7].weight == 1).all())))
    return found


def teams(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Train, save and go on in groups of two, each in its own."""
    groups = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    team, place = divmod(rank, 2)
    options = ELASTIC | {"process_group": groups[team]}
    path = folder / f"team {team}"
    train(place, 2, **options, steps=3, save=partial(save_checkpoint, path))

    def load(model: nn.Module, optimizer: TDLRT) -> None:
        assert load_checkpoint(path, model, optimizer) == {}

    return train(place, 2, **options, start=3, steps=6, load=load)


# Models in parts: a budget whose schedule is under way, so that ranks change before and after.

PARTS: dict[str, Any] = {"wrap": "sharded", "kind": "adam", "rule": TRAININGS["budget"]["rule"]}


def saved_parts(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Train half of the way; all processes save into a folder, twice."""

    def save(model: nn.Module, optimizer: TDLRT) -> None:
        for step in (2, 3):
            save_checkpoint(folder / f"parts of {world}", model, optimizer, step=step, rank=rank)

    return train(rank, world, **PARTS, steps=3, save=save)


def resumed_parts(name: str) -> Scenario:
    """Go on from a file or folder, on any number of processes."""

    def scenario(folder: Path, rank: int, world: int) -> dict[str, Any]:
        def load(model: nn.Module, optimizer: TDLRT) -> None:
            assert load_checkpoint(folder / name, model, optimizer)["step"] == 3

        options = PARTS | {"steps": 3}
        if name == "checkpoint":
            options = ELASTIC | {"wrap": "sharded", "steps": 6}
        return train(rank, world, **options, start=3, load=load)

    return scenario


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


SCENARIOS: dict[str, Scenario] = {
    f.__name__: f
    for f in (
        failed_parts,
        other_files,
        own_parts,
        refused_parts,
        refused_save,
        resumed,
        saved,
        saved_parts,
        teams,
    )
}
SCENARIOS |= {
    f"resumed {name}": resumed_parts(name) for name in ("parts of 1", "parts of 2", "checkpoint")
}
