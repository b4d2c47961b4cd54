"""What the scripts of this folder share: how answers are printed, and some measurements."""

import math
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

Optimize = Callable[[nn.Module, float], torch.optim.Optimizer]
Build = Callable[[], tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]]
RATES = (0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0)


def begin(*packages: str) -> None:
    """Print what is compared, and make the run repeatable."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - what TensorLy draws from
    torch.set_num_threads(1)
    packages = ("geotucker", "torch", "numpy", *packages)
    print(", ".join(f"{package} {version(package)}" for package in packages))
    tell("", packages[-1], "geotucker")


def tell(what: str, theirs: object, ours: object = "") -> None:
    """Print a row: what was tried, what the other library did, what this one did."""
    print(f"{what:<28} | {theirs!s:<44} | {ours}".rstrip(" |"))


def attempt(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or its error in one line."""
    try:
        return call()
    except Exception as error:
        text = str(error).strip()
        if "Traceback" in text:  # of another process
            text = text[text.rindex("\n    ") :].strip().split("\n", 1)[-1]
        else:
            text = f"{type(error).__name__}: {text}"
        last = " ".join(text.split())
        return last if len(last) <= 64 else last[:61] + "..."


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int
) -> float:
    """Train by least squares, one pass a step, and return the last loss."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def best(build: Callable[[], nn.Module], optimize: Optimize, x: Tensor, y: Tensor) -> str:
    """Return the lowest loss after 200 steps over the learning rates, some of which diverge."""
    losses = []
    for rate in RATES:
        model = build()
        loss = attempt(partial(fit, model, optimize(model, rate), x, y, 200))
        losses.append(loss if isinstance(loss, float) and math.isfinite(loss) else math.inf)
    return f"{min(losses):.0e}"


def size(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def start(smallest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return core and bases of a matrix with singular values from 1 to the smallest."""
    u, v = (torch.linalg.qr(torch.randn(32, 4)).Q for _ in range(2))
    return torch.diag(torch.logspace(0, math.log10(smallest), 4)), u, v


def departure(*bases: Tensor) -> str:
    """Return how far columns are from orthonormal: the largest entry of UᵀU - I."""
    gaps = [(u.mT @ u - torch.eye(u.shape[1])).abs().max().item() for u in bases]
    return f"{max(gaps):.0e}"


def data_parallel(build: Build, steps: int = 5) -> str:
    """Train under DistributedDataParallel in two processes and compare their weights."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_process, (build, steps, folder), nprocs=2, start_method="fork")
        first, second = (torch.load(Path(folder, f"{rank}.pt")) for rank in range(2))
    shapes = [w.shape for w in first] == [w.shape for w in second]
    same = shapes and all(map(torch.equal, first, second))
    return "the same weights in both processes" if same else "different weights"


def _process(rank: int, build: Build, steps: int, folder: str) -> None:
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, optimizer, x, y = build()
    halves = slice(rank, None, 2)
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    if any(p.requires_grad and name not in ignored for name, p in model.named_parameters()):
        wrapped = DistributedDataParallel(model)
    else:  # it refuses models of which it would average nothing
        wrapped = model
    fit(wrapped, optimizer, x[halves], y[halves], steps)
    torch.save([w.detach() for w in model.parameters()], f"{folder}/{rank}.pt")
    destroy_process_group()
