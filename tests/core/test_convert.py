"""Arrays and points go from library to library over the same memory."""

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given

import geotucker as gt
from geotucker.testing import shapes_and_ranks

ON_THE_HOST = ("numpy", "torch", "jax.numpy")


@pytest.fixture(scope="module", autouse=True)
def x64():
    """Let JAX have float64."""
    importlib.import_module("jax").config.update("jax_enable_x64", True)


def address(array: Any) -> int:
    """Return where the entries begin."""
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    return array.data_ptr() if hasattr(array, "data_ptr") else array.unsafe_buffer_pointer()


def aligned(*shape: int) -> np.ndarray:
    """Return zeros that begin at a multiple of 64 bytes: others JAX copies."""
    size = 8 * int(np.prod(shape))
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float64).reshape(shape)


def aligned_point() -> gt.TuckerPoint:
    point = gt.TuckerPoint(aligned(2, 3), (aligned(4, 2), aligned(5, 3)))
    for array, random in zip((point.core, *point.factors), _arrays(_random()), strict=True):
        array[...] = random
    return point


def _random() -> gt.TuckerPoint:
    return gt.testing.random_point((4, 5), (2, 3))


def _arrays(point: Any) -> tuple[Any, ...]:
    return (point.core, *point.factors)


@pytest.mark.parametrize("name", ON_THE_HOST)
@given(drawn=shapes_and_ranks(max_order=3))
def test_there_and_back_is_the_same_tensor(name, drawn):
    library, point = importlib.import_module(name), gt.testing.random_point(*drawn)
    there = gt.convert(point, library)
    assert isinstance(there, gt.TuckerPoint)
    assert all(type(array) is type(library.zeros(1)) for array in _arrays(there))
    for before, after in zip(_arrays(point), _arrays(gt.convert(there, np)), strict=True):
        assert np.array_equal(before, after)


@pytest.mark.parametrize("target", ON_THE_HOST)
@pytest.mark.parametrize("source", ON_THE_HOST)
def test_memory_is_shared_on_the_host(source, target):
    original = aligned_point()
    here = gt.convert(original, importlib.import_module(source))
    there = gt.convert(here, importlib.import_module(target))
    for a, b, c in zip(_arrays(original), _arrays(here), _arrays(there), strict=True):
        assert address(a) == address(b) == address(c)
        if "jax.numpy" not in (source, target):  # which takes its memory to be constant
            a[0, 0] = 7.0
            assert float(c[0, 0]) == 7.0


def test_tangent_vectors_pairs_and_plain_arrays():
    import torch

    point = gt.testing.random_point((4, 5), (2, 2))
    tangent = gt.convert(gt.project(point, np.ones((4, 5))), torch)
    assert isinstance(tangent, gt.TuckerTangent)
    assert isinstance(gt.convert([point.core, list(point.factors)], torch), gt.TuckerPoint)
    there = gt.convert(point, torch)
    assert isinstance(gt.retract(there, tangent).core, torch.Tensor)
    numbers = np.arange(3)
    assert address(gt.convert(numbers, torch)) == numbers.ctypes.data  # of any dtype
    view = gt.convert(np.arange(6.0).reshape(2, 3).T, torch)
    assert view.stride() == (1, 3)


def test_a_plain_array_may_be_complex():
    import torch

    there = gt.convert(np.array([1.0, 2.0 + 3.0j]), torch)
    assert there.tolist() == [1.0, 2.0 + 3.0j]


def test_what_cannot_be_shared_is_said():
    import jax
    import torch

    ones, jnp = np.ones((2, 3)), jax.numpy
    read_only = np.broadcast_to(ones, (2, 3))
    assert not read_only.flags.writeable
    assert gt.convert(read_only, np).shape == (2, 3)
    half = torch.ones(2, dtype=torch.bfloat16)
    assert gt.convert(half, jnp).dtype == jnp.bfloat16
    graph = torch.ones(2, requires_grad=True)
    cases = [
        (read_only, torch, "read-only"),
        (read_only, jnp, "read-only"),
        (ones[::-1], torch, "negative"),
        (half, np, "numpy cannot share this bfloat16 array"),
        (graph, np, "detach"),
        (torch.ones(2, device="meta"), np, "on meta"),
        (np.ones((4, 4))[:, ::2], jnp, "strid"),
    ]
    for array, library, word in cases:
        with pytest.raises(gt.BackendError, match=f"^value: .*{word}"):
            gt.convert(array, library)
    with pytest.raises(gt.BackendError, match=r"^value.factors\[1\]: .*negative"):
        gt.convert((np.ones((1, 1)), [np.ones((3, 1)), np.ones((2, 1))[::-1]]), torch)
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(gt.BackendError, match=r"would become float32.*jax_enable_x64"):
            gt.convert(ones, jnp)
    finally:
        jax.config.update("jax_enable_x64", True)


@pytest.mark.parametrize("library", ["torch", None, importlib.import_module("math"), np.ones(1)])
def test_the_library_is_a_module_that_takes_dlpack(library):
    with pytest.raises(gt.BackendError, match=r"^library: .*from_dlpack.*got"):
        gt.convert(np.ones(2), library)


def test_what_is_no_array_and_no_pair():
    import torch

    with pytest.raises(gt.ShapeError, match=r"^value: expected a pair"):
        gt.convert(3.0, torch)
    with pytest.raises(gt.BackendError, match=r"value.core: .*got builtins.list"):
        gt.convert(([1.0], [[2.0]]), torch)
