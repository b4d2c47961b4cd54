"""NaN on one process, errors on one process, and processes that are killed."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.nn.parallel import DistributedDataParallel

import geotucker as gt
from geotucker_torch import TDLRT, save_checkpoint

from .checkpoints import PARTS, trained_parts
from .meeting import TIMEOUT, Scenario, publish_store, read_port
from .trainings import OPTIMIZERS, batch, network, shard, shard_dense_parts


def broken_input(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """NaN comes on one process; the same step goes well afterwards."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = TDLRT(OPTIMIZERS["adam"](model), model, gt.Tolerance(0.1))
    x, y = (shard(t, rank, world) for t in batch(0))
    before = [t.clone() for t in model.state_dict().values()]
    nn.functional.cross_entropy(wrapped(x * torch.nan if rank == world - 1 else x), y).backward()
    try:
        optimizer.step()
    except gt.NonFiniteError as error:
        message = str(error)
    same = all(map(torch.equal, before, model.state_dict().values()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = [scaler.get_scale()]
    for skipped in (True, False):
        optimizer.zero_grad()
        broken = skipped and rank == world - 1
        loss = nn.functional.cross_entropy(wrapped(x * torch.inf if broken else x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        same = same and skipped == all(map(torch.equal, before, model.state_dict().values()))
    return {"message": message, "same": same, "ranks": optimizer.ranks, "scales": scales}


def broken_between(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """NaN comes on one process between changes of the bases, and is told of a step later."""
    model = network()
    wrapped = DistributedDataParallel(model)
    rule, late = gt.Tolerance(0.1), {"basis_every": 5, "late_check": True}
    optimizer = TDLRT(OPTIMIZERS["adam"](model), model, rule, **late)
    x, y = (shard(t, rank, world) for t in batch(0))
    told, kept = [], []
    for step in range(6):
        before = [t.clone() for t in model.parameters()]
        broken = step == 2 and rank == world - 1
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x * torch.nan if broken else x), y).backward()
        try:
            optimizer.step()
        except gt.NonFiniteError as error:
            told.append((step, str(error)))
        # In the last step the bases move, and ranks may change.
        kept.append(step < 5 and all(map(torch.equal, before, model.parameters())))
    return {"told": told, "kept": kept, "weights": model.state_dict(), "ranks": optimizer.ranks}


def broken_part(folder: Path, rank: int, world: int) -> list[str]:
    """NaN is in the gradient of one process's part of a tensor, of one and of the other."""
    messages = []
    for broken in range(world):
        model = network()
        shard_dense_parts(model)
        optimizer = TDLRT(OPTIMIZERS["sgd"](model), model)
        model(batch(0)[0]).sum().backward()
        if rank == broken:
            model[5].bias.grad.to_local()[0] = torch.nan
        try:
            optimizer.step()
        except gt.NonFiniteError as error:
            messages.append(str(error))
    return messages


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


# A process is killed.


def killed_with_parts(phase: str) -> Scenario:
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


def killed_in(phase: str) -> Scenario:
    """Train until a process is killed: the first one while it saves, else the last one."""

    def scenario(folder: Path, rank: int, world: int) -> str:
        model = network()
        outer = DistributedDataParallel(model) if phase == "backward" else model
        path = folder / f"before {phase} of {world}"
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
                    save_checkpoint(path, model, optimizer, step=step)
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


SCENARIOS: dict[str, Scenario] = {
    f.__name__: f
    for f in (broken_input, broken_between, broken_part, killed_with_the_store, own_errors)
}
SCENARIOS |= {f"killed in {phase}": killed_in(phase) for phase in PHASES}
SCENARIOS |= {f"killed with {phase}": killed_with_parts(phase) for phase in ("parts", "index")}
