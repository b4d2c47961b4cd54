"""What the benchmarks measure: times side by side, shares of a profile, peak memory."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import geotucker as gt
from geotucker_torch import _lift, _optimizer

_LINEAR_ALGEBRA = ("linalg_qr", "geqrf", "orgqr", "householder", "svd", "eigh", "eigvalsh",
                   "cholesky", "triangular")  # fmt: skip
_MOVING, _MEASURED = "moving the bases", "the measured period"


class Timed(NamedTuple):
    """A function to be timed, and how many calls in a row are one measurement of it."""

    call: Callable[[], Any]
    calls: int = 1


class Times(NamedTuple):
    """Medians per call, in seconds, and the medians of their ratios to the first function's."""

    wall: float
    cpu: float
    wall_ratio: float
    cpu_ratio: float


def interleaved(functions: Mapping[str, Timed], repeats: int) -> dict[str, Times]:
    """Time all functions in turns, so that what slows the machine slows all of them.

    Each is called first for one measurement that does not count. Ratios are taken within a turn.
    """
    for timed in functions.values():
        _seconds(timed)
    turns = [{name: _seconds(timed) for name, timed in functions.items()} for _ in range(repeats)]
    first = next(iter(functions))
    return {
        name: Times(
            *(median(turn[name][clock] for turn in turns) for clock in (0, 1)),
            *(median(turn[name][clock] / turn[first][clock] for turn in turns) for clock in (0, 1)),
        )
        for name in functions
    }


def _seconds(timed: Timed) -> tuple[float, float]:
    """Return wall and process time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    repeat(timed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / timed.calls, cpu / timed.calls


class Shares(NamedTuple):
    """Fractions of the processor's time."""

    linear_algebra: float  # decompositions and triangular solves
    moving: float  # all that extends and truncates bases, products of matrices included


def shares(timed: Timed) -> Shares:
    """Profile one measurement."""
    with _marked(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        repeat(timed)
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    algebra = sum(
        event.self_cpu_time_total
        for event in events
        if any(name in event.key for name in _LINEAR_ALGEBRA)
    )
    moving = sum(event.cpu_time_total for event in events if event.key == _MOVING)
    return Shares(algebra / total, moving / total)


@contextmanager
def _marked() -> Iterator[None]:
    """Name in profiles the functions of the core by which bases are moved."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            with record_function(_MOVING):
                return function(*args, **kwargs)

        return marked

    with (
        patch.object(gt, "augment", mark(gt.augment)),
        patch.object(gt, "truncate", mark(gt.truncate)),
        patch.object(_lift, "augment_all", mark(_lift.augment_all)),
        patch.object(_optimizer, "follow", mark(_optimizer.follow)),
    ):
        yield


def peak_bytes(
    timed: Timed, model: nn.Module, optimizer: torch.optim.Optimizer, others: Iterable[Tensor] = ()
) -> int:
    """Return the most memory that tensors hold at once during one measurement.

    Counted are model, gradients, optimizer state and `others` as they are before, and from then
    on what PyTorch's allocator gives and takes. (What libraries take for themselves is not seen.)
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        repeat(timed)  # the profiler overlooks the end of tensors whose beginning it has not seen
        held = _bytes([*_tensors(model, optimizer), *others])
        with record_function(_MEASURED):
            repeat(timed)
    assert profiled.profiler is not None
    results: Any = profiled.profiler.kineto_results
    start = next(event.start_ns() for event in results.events() if event.name() == _MEASURED)
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.start_ns() >= start
    )
    return max(accumulate((change for _, change in changes), initial=held))


def repeat(timed: Timed) -> None:
    """Call it as often as makes one measurement."""
    for _ in range(timed.calls):
        timed.call()


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield what a model in training keeps between steps."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
