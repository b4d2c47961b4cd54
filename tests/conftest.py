"""Fixtures and profiles that all tests share.

The tested array libraries are a declared list: a missing one is an error, so that a broken
environment cannot pass for a green run. Only CuPy, which needs a GPU, is skipped.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorly as tl
from hypothesis import HealthCheck, settings

# JAX compiles every operation for every shape that a test draws; none runs for long. Without the
# newer emitters of code it compiles twice as fast.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false",
)

BACKENDS = (
    "numpy",
    "pytorch",
    # One worker compiles for all tests: most share shapes with others.
    pytest.param("jax", marks=pytest.mark.xdist_group("jax")),
    "cupy",
)
REPOSITORY = Path(__file__).resolve().parents[1]

# "fast" draws the same examples in every run, so that a red run can be repeated by anyone.
settings.register_profile(
    "fast",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough",
    deadline=None,
    max_examples=500,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@dataclass(frozen=True)
class Backend:
    """One array library, seen from a test: arrays go in from NumPy and come back to NumPy.

    ``float32`` and ``float64`` are the library's own dtypes.
    """

    name: str  # TensorLy's name of the library
    float32: Any
    float64: Any
    convert: Callable[[np.ndarray], Any]
    to_numpy: Callable[[Any], np.ndarray]

    def array(self, values: Any, dtype: str | None = None) -> Any:
        """Return an array of this library; `dtype` is "float32" or "float64" or as given."""
        return self.convert(np.array(values, dtype=dtype))

    def numpy(self, array: Any) -> np.ndarray:
        """Copy an array of this library to NumPy."""
        return np.array(self.to_numpy(array))

    def dtype(self, name: str) -> Any:
        """Return the library's dtype called "float32" or "float64"."""
        return {"float32": self.float32, "float64": self.float64}[name]


def _read_only(values: np.ndarray) -> np.ndarray:
    """Freeze a NumPy array: code that writes into its arguments then fails."""
    values.setflags(write=False)
    return values


def _numpy() -> Backend:
    return Backend("numpy", np.float32, np.float64, _read_only, np.asarray)


def _pytorch() -> Backend:
    torch = importlib.import_module("torch")
    return Backend(
        "pytorch", torch.float32, torch.float64, torch.tensor, lambda array: array.detach().numpy()
    )


def _jax() -> Backend:
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)  # else float64 silently becomes float32
    return Backend("jax", jax.numpy.float32, jax.numpy.float64, jax.numpy.asarray, np.asarray)


def _cupy() -> Backend:
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"cupy finds no CUDA device: {error}")
    if devices == 0:
        pytest.skip("cupy finds no CUDA device")
    return Backend("cupy", cupy.float32, cupy.float64, cupy.asarray, cupy.asnumpy)


_MAKERS = {"numpy": _numpy, "pytorch": _pytorch, "jax": _jax, "cupy": _cupy}


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """One array library after the other (session scope, as hypothesis wants it)."""
    return _MAKERS[request.param]()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real data sets: ``GEOTUCKER_DATA_DIR``, else one beside the clone."""
    named = os.environ.get("GEOTUCKER_DATA_DIR")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if folder.is_dir():
        return folder
    if named:
        pytest.fail(f"GEOTUCKER_DATA_DIR names no folder: {named}")
    pytest.skip("no real data here: set GEOTUCKER_DATA_DIR to the folder that holds mnist/")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``gpu`` where PyTorch finds no CUDA device."""
    if item.get_closest_marker("gpu") is None:
        return
    if not importlib.import_module("torch").cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def tltorch() -> Iterator[Any]:
    """tensorly-torch, with TensorLy's backend put back afterwards (its import switches it)."""
    before = tl.get_backend()
    module = pytest.importorskip("tltorch", reason="tensorly-torch is not installed")
    tl.set_backend("pytorch")  # its layers need it at run time
    yield module
    tl.set_backend(before)
