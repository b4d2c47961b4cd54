"""CuPy on a GPU: whose memory is used, what stays of it, and where results lie."""

import gc
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import geotucker as gt
from geotucker_cupy import require_device

from ..core.algorithms import Problem, algorithms, complete
from ..core.cases import arrays_in

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy() -> ModuleType:
    module = pytest.importorskip("cupy", reason="cupy is not installed")
    require_device()
    return module


def used(cupy: ModuleType) -> int:
    """Return the bytes of CuPy's default pool that are in use."""
    gc.collect()
    cupy.cuda.Device().synchronize()
    return cupy.get_default_memory_pool().used_bytes()


def all_results(problem: Problem) -> list[Any]:
    return [*(run() for run in algorithms(problem).values()), complete(problem)]


def test_results_are_in_the_default_pool_and_nothing_stays(cupy):
    problem = Problem(cupy.asarray)
    all_results(problem)  # what handles and compiled kernels keep
    before = used(cupy)
    results = all_results(problem)
    arrays = [array for array in arrays_in(results) if isinstance(array, cupy.ndarray)]
    owned = {array.data.mem.ptr: array.data.mem.size for array in arrays}
    assert used(cupy) >= before + sum(owned.values()) > before
    del results, arrays
    assert used(cupy) == before


def test_results_are_on_the_device_of_the_input(cupy):
    count = cupy.cuda.runtime.getDeviceCount()
    for index in range(count):
        with require_device(index) as device:
            results = all_results(Problem(cupy.asarray))
            array = cupy.ones((3, 4))
        devices = {a.device.id for a in arrays_in(results) if isinstance(a, cupy.ndarray)}
        assert devices == {device.id} == {index}
        if index != cupy.cuda.Device().id:
            with pytest.raises(gt.BackendError, match=r"tensor: .*current CUDA device"):
                gt.hosvd(array, 1)


def test_memory_is_shared_with_pytorch(cupy):
    torch = pytest.importorskip("torch")
    there = gt.testing.random_point((4, 5), (2, 2))
    point = gt.TuckerPoint(cupy.asarray(there.core), tuple(map(cupy.asarray, there.factors)))
    tensors = gt.convert(point, torch)
    back = gt.convert(tensors, cupy)
    for array, tensor, again in zip(
        arrays_in(point), arrays_in(tensors), arrays_in(back), strict=True
    ):
        assert tensor.is_cuda
        assert array.data.ptr == tensor.data_ptr() == again.data.ptr
    assert np.allclose(cupy.asnumpy(gt.to_dense(back)), gt.to_dense(there))
    with pytest.raises(gt.BackendError, match="numpy cannot share"):
        gt.convert(point, np)
