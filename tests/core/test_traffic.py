"""What comes to the host: numbers and spectra, whatever the size of tensors and data.

CuPy's stand-in counts every copy. In PyTorch all that returns numbers of Python or arrays of NumPy
is a function or method that a mode sees, whatever the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from ..cupy.stand_in import installed, traffic
from .algorithms import RANKS, Problem, algorithms, complete

SIDE = 16
# The most that comes at once: a spectrum per mode, of bases that hold the old, the new and a
# moment's directions, at ranks that have doubled.
SPECTRA = 8 * 6 * sum(RANKS)
# How often the host waits for the device at most; twice for a step where it is not said.
WAITS = {
    **{"hosvd": 2, "st_hosvd": 4, "orthonormalise": 1, "round": 5, "arithmetic": 7, "to_dense": 0},
    **{"project": 5, "retract": 8, "transport": 5, "augment": 1, "truncate": 2},
    **{"integrate": 27, "integrate, adaptive": 40, "rank rules": 104, "batches": 36},
    **{"TDLRT": 34, "Tangent": 34, "Standard": 56, "Standard, not augmented": 54},
    **{"Flow": 60, "ConjugateGradient": 61},
}
OBJECTIVE = {"": 10, "start": 14, "grow": 33}

_TO_HOST = {
    *("item", "tolist", "numpy", "cpu", "is_nonzero", "nonzero", "equal", "allclose"),
    *("__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__"),
}


class _Hosts(TorchFunctionMode):
    """Collects the sizes of what is turned into Python's or NumPy's."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") in _TO_HOST:
            self.sizes.append(args[0].numel() * args[0].itemsize)
        return function(*args, **(kwargs or {}))


@contextmanager
def counted_by_cupy() -> Iterator[list[int]]:
    with traffic.counted():
        yield traffic.to_host


@contextmanager
def counted_by_torch() -> Iterator[list[int]]:
    with _Hosts() as mode:
        yield mode.sizes


Library = tuple[Callable[[np.ndarray], Any], Callable[[], Any]]


@pytest.fixture(scope="module", params=["cupy", "pytorch"])
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Return how arrays come to a device, and how what comes back is counted."""
    if request.param == "pytorch":
        yield torch.from_numpy, counted_by_torch
        return
    with installed() as cupy:
        yield cupy.asarray, counted_by_cupy


def test_the_counters_count(library):
    put, counted = library
    array = put(np.arange(6.0))
    with counted() as sizes:
        array.tolist(), array[1].item(), float(array[1]), bool(array[1] > 0), int(array[2])
    assert sizes == [48, 8, 8, 1, 8]


def test_numbers_and_spectra_alone_come_to_the_host(library):
    put, counted = library
    problem = Problem(put, SIDE)
    assert 10 * SPECTRA < 8 * problem.entries < 8 * np.prod(problem.shape)
    for name, run in algorithms(problem).items():
        with counted() as sizes:
            run()
        decomposed = name in ("hosvd", "st_hosvd")  # of the tensor itself
        assert max(sizes, default=0) <= (8 * sum(problem.shape) if decomposed else SPECTRA), name
        waits = WAITS.get(name)
        if waits is None:
            waits = OBJECTIVE[name.partition(", ")[2].partition(", ")[2]]
        assert len(sizes) <= waits, name
        assert len(sizes) or name == "to_dense"


def test_completion_leaves_the_entries_where_they_are(library):
    put, counted = library
    problem = Problem(put, SIDE)
    with counted() as sizes:
        complete(problem)
    assert 0 < max(sizes) <= SPECTRA


def test_nothing_goes_to_the_device_within_a_step():
    bases = 8 * (SIDE + 1) * max(RANKS)  # random ones, to start from
    with installed() as cupy:
        for name, run in algorithms(Problem(cupy.asarray, SIDE)).items():
            with traffic.counted():
                run()
            starts = name.endswith(("start", "grow"))
            if name != "batches":  # which are drawn on the host
                assert max(traffic.to_device, default=0) <= (bases if starts else 0), name
