"""The stand-in offers what CuPy has, refuses what CuPy refuses, and goes without a trace."""

import inspect
import sys

import numpy as np
import pytest
import tensorly as tl

from . import stand_in
from .stand_in import ndarray, traffic


@pytest.fixture(scope="module")
def real():
    """CuPy itself, which can be imported without a GPU."""
    return pytest.importorskip("cupy", reason="cupy is not installed")


def test_cupy_has_every_name(real, monkeypatch):
    with stand_in.installed() as cupy:
        offered = set(vars(cupy)) - {"__name__", "__doc__", "__package__", "__loader__", "__spec__"}
        linalg, cuda = set(vars(cupy.linalg)), set(vars(cupy.cuda))
        runtime = set(vars(cupy.cuda.runtime))
    assert {name for name in offered if not hasattr(real, name)} == set()
    assert {name for name in linalg if not hasattr(real.linalg, name)} == set()
    assert {name for name in cuda if not hasattr(real.cuda, name)} == set()
    assert {name for name in runtime if not hasattr(real.cuda.runtime, name)} == set()
    members = {name for name in vars(ndarray) if name != "_values" and name not in vars(type)}
    members -= {"__dict__", "__weakref__"}
    assert {name for name in members if not hasattr(real.ndarray, name)} == set()
    assert real.ndarray.__module__ == ndarray.__module__
    assert {"id", "__enter__", "__exit__"} <= set(dir(real.cuda.Device))


def test_functions_take_cupys_parameters(real):
    for table, module in (
        (stand_in.FUNCTIONS, real),
        (stand_in.CREATION, real),
        (stand_in.LINALG, real.linalg),
    ):
        for name, parameters in table.items():
            known = list(inspect.signature(getattr(module, name)).parameters)
            assert parameters.split() == known[: len(parameters.split())], name
    for name, count in stand_in.UFUNCS.items():
        assert getattr(real, name).nin == count
        assert callable(real.add.at)
    own = inspect.signature(stand_in._array).parameters
    assert set(own) <= set(inspect.signature(real.array).parameters)


def test_cupy_refuses_the_host_too(real):
    memory = real.cuda.UnownedMemory(4096, 96, None, device_id=0)  # never read
    array = real.ndarray((3, 4), "f8", real.cuda.MemoryPointer(memory, 0))
    with pytest.raises(TypeError, match="Implicit conversion to a NumPy array is not allowed"):
        np.asarray(array)
    for call in (
        lambda: array @ np.ones(4),
        lambda: real.tensordot(array, np.ones((3, 4)), 2),
        lambda: real.moveaxis(np.ones((3, 4)), 0, 1),
        lambda: real.from_dlpack(np.ones(3)),
    ):
        with pytest.raises(TypeError):
            call()
    # Views need no driver: what the core relies on beside functions.
    assert array.T.shape == (4, 3)
    assert array[..., None, :].shape == (3, 1, 4)
    assert array.strides == (32, 8)
    assert array.device.id == 0


@pytest.fixture(scope="module")
def cupy():
    with stand_in.installed() as module:
        yield module


def test_nothing_comes_to_the_host_unasked(cupy):
    array, host = cupy.asarray(np.ones((3, 3))), np.ones((3, 3))
    calls = {
        "asarray": lambda: np.asarray(array),
        "NumPy's qr": lambda: np.linalg.qr(array),
        "NumPy's add": lambda: np.add(array, 1.0),
        "array + host": lambda: array + host,
        "host + array": lambda: host + array,
        "host @ array": lambda: host @ array,
        "tensordot": lambda: cupy.tensordot(array, host, 2),
        "concatenate": lambda: cupy.concatenate([array, host]),
        "exp": lambda: cupy.exp(host),
        "sum": lambda: cupy.sum(host),
        "qr": lambda: cupy.linalg.qr(host),
        "from_dlpack": lambda: cupy.from_dlpack(host),
        "take": lambda: array.take(np.array([0]), axis=0),
        "index": lambda: range(cupy.asarray(3)),
    }
    for name, call in calls.items():
        with traffic.counted():
            with pytest.raises((TypeError, ValueError)):
                pytest.fail(f"{name}: {call()}")
            assert traffic.to_host == [], name


def test_what_crosses_is_counted(cupy):
    with traffic.counted():
        array = cupy.asarray(np.arange(4.0))
        assert traffic.to_device == [32]
        total = cupy.sum(array * 2.0) + array[1] * np.float64(1)
        assert total.shape == () and isinstance(total, ndarray)
        assert traffic.to_host == []
        assert float(total) == 13.0 and bool(total > 1) and int(total) == 13
        assert cupy.asnumpy(array).tolist() == array.tolist() == array.get().tolist()
        assert total.item() == 13.0
        assert traffic.to_host == [8, 1, 8, 32, 32, 32, 8]
        assert traffic.to_device == [32]


def test_linear_algebra_is_that_of_cupy(cupy):
    half = cupy.asarray(np.eye(3, dtype=np.float16))
    for decompose in (cupy.linalg.qr, cupy.linalg.svd):
        with pytest.raises(TypeError, match="float16 is unsupported in linalg"):
            decompose(half)
    broken = cupy.asarray(np.full((3, 3), np.nan))
    u, _, _ = cupy.linalg.svd(broken)  # cuSOLVER does not tell
    assert np.isnan(u.get()).all()
    stacks = cupy.asarray(np.ones((2, 3, 4)))
    assert [part.shape for part in cupy.linalg.qr(stacks)] == [(2, 3, 3), (2, 3, 4)]


def test_arrays_of_another_device_are_refused(cupy):
    array = cupy.asarray(np.ones(3))
    with cupy.cuda.Device(1):
        other = cupy.asarray(np.ones(3))
        with pytest.raises(ValueError, match="must be same as the current device"):
            array + 1.0
    assert (array.device.id, other.device.id, cupy.cuda.Device().id) == (0, 1, 0)


def test_it_goes_without_a_trace():
    from geotucker import _ops

    before = {name: module for name, module in sys.modules.items() if "cupy" in name}
    with stand_in.installed() as cupy:
        assert sys.modules["cupy"] is cupy
        array = cupy.asarray(np.ones((2, 2)))
        tl.set_backend("cupy")
        assert tl.norm(array) == 2.0
        assert _ops.backend_name(array) == "cupy"
        tl.set_backend("numpy")
    after = {name: module for name, module in sys.modules.items() if "cupy" in name}
    assert before == after
