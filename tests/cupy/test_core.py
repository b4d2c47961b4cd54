"""The core on CuPy's arrays, as the stand-in has them: NumPy's results, and clear errors."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tensorly as tl

import geotucker as gt
from geotucker_cupy import DeviceError, require_device

from ..core.algorithms import Problem, algorithms, complete
from ..core.cases import arrays_in
from .stand_in import DEVICES, installed


@pytest.fixture(scope="module")
def cupy() -> Iterator[ModuleType]:
    with installed() as module:
        yield module


def on_the_host(result: Any) -> list[Any]:
    return [part.get() if hasattr(part, "get") else part for part in arrays_in(result)]


def assert_alike(found: Any, expected: Any, kind: type, name: str) -> None:
    pairs = zip(arrays_in(found), on_the_host(found), arrays_in(expected), strict=True)
    for there, here, array in pairs:
        assert isinstance(there, kind) or isinstance(array, float), name
        assert np.allclose(here, array, rtol=1e-9, atol=1e-9), name


def test_every_algorithm_gives_numpys_result(cupy):
    tl.set_backend("cupy")  # as users do; it plays no part
    there, here = Problem(cupy.asarray), Problem(np.asarray)
    expected = algorithms(here)
    for name, run in algorithms(there).items():
        assert_alike(run(), expected[name](), cupy.ndarray, name)
    assert_alike(complete(there), complete(here), cupy.ndarray, "complete")


def test_single_and_half_precision(cupy):
    for dtype, tolerance in (("float32", 1e-5), ("float16", 2e-2)):
        tensor = gt.to_dense(gt.testing.random_point((6, 5, 40), (2, 2, 2))).astype(dtype)
        for decompose in (gt.hosvd, gt.st_hosvd):
            point = decompose(cupy.asarray(tensor), 2)
            assert point.core.dtype == dtype
            error = gt.to_dense(point).get() - tensor
            assert np.linalg.norm(error) <= tolerance * np.linalg.norm(tensor)


def test_tensorly_takes_the_points(cupy):
    tl.set_backend("cupy")
    point = gt.hosvd(cupy.asarray(np.arange(24.0).reshape(2, 3, 4)), 2)
    found = tl.tucker_to_tensor(point)
    assert isinstance(found, cupy.ndarray)
    assert np.allclose(found.get(), np.arange(24.0).reshape(2, 3, 4))


def test_indices_may_be_on_the_device(cupy):
    known, values = np.nonzero(np.ones((3, 4))), cupy.asarray(np.arange(12.0))
    on_device = [cupy.asarray(rows) for rows in known]
    point = gt.completion(known, values, (3, 4)).start(1)
    other = gt.completion(on_device, values, (3, 4)).start(1)
    assert np.array_equal(point.core.get(), other.core.get())


def test_saved_points_come_from_the_device(cupy, tmp_path):
    point = gt.hosvd(cupy.asarray(np.ones((3, 4))), 1)
    gt.save(tmp_path / "point.npz", point)
    assert np.allclose(gt.to_dense(gt.load(tmp_path / "point.npz")), 1.0)


def test_libraries_do_not_mix(cupy):
    core, factors = gt.testing.random_point((3, 4), (2, 2))
    mixed = cupy.asarray(core), factors
    with pytest.raises(gt.BackendError, match=r"factors\[0\]: expected cupy.* got numpy"):
        gt.as_point(mixed)
    point = gt.hosvd(cupy.asarray(np.ones((3, 4))), 1)
    with pytest.raises(gt.BackendError, match=r"gradient: expected cupy .* got numpy"):
        gt.project(point, np.ones((3, 4)))
    with pytest.raises(gt.BackendError, match="expected arrays of PyTorch or JAX, got cupy"):
        gt.Autodiff(lambda dense: dense[0, 0], dense=True)(point)


def test_what_cannot_be_shared_is_said(cupy):
    import torch

    with pytest.raises(gt.BackendError, match=r"value.core: cupy cannot share.*CPU arrays"):
        gt.convert(gt.testing.random_point((3, 4), (2, 2)), cupy)
    for library in (np, torch):
        with pytest.raises(gt.BackendError, match="cannot share this float64 array of cupy"):
            gt.convert(cupy.asarray(np.ones(3)), library)
    array = cupy.asarray(np.ones((3, 2)))
    assert gt.convert(array, cupy).shape == (3, 2)
    with pytest.raises(gt.BackendError, match="negative"):
        gt.convert(array[::-1], cupy)


def test_results_are_on_the_device_of_the_input(cupy):
    with require_device(1):
        z = cupy.asarray(np.ones((3, 4)))
    with pytest.raises(
        gt.BackendError, match=r"tensor: .* current CUDA device, 0, got one on device 1; compute"
    ):
        gt.hosvd(z, 1)
    with z.device:
        point = gt.hosvd(z, 1)
        objective = gt.least_squares(z)
        result = gt.minimize(objective, objective.start(1), integrator=gt.ConjugateGradient())
    for array in arrays_in((point, result.point)):
        assert array.device.id == 1
    with pytest.raises(gt.BackendError, match=r"point.core: .*on device 1"):
        gt.norm(point)


def test_what_is_missing_is_said(cupy, monkeypatch):
    for index in (DEVICES, -1):
        with pytest.raises(DeviceError, match=f"from 0 to {DEVICES - 1}, got {index}"):
            require_device(index)

    def no_driver() -> int:
        raise cupy.cuda.runtime.CUDARuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", no_driver)
    with pytest.raises(DeviceError, match=r"no usable CUDA driver.*cudaErrorInsufficientDriver"):
        require_device()
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r"pip install 'geotucker\[cupy\]'"):
        require_device()
