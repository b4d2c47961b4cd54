"""Device checks: what CuPy needs, and a clear word where it is missing."""

import importlib
from types import ModuleType
from typing import Any

from geotucker import GeotuckerError

__all__ = ["DeviceError", "require_device"]


class DeviceError(GeotuckerError, RuntimeError):
    """CuPy, the CUDA driver or the CUDA device that was asked for is missing."""


def require_device(index: int = 0) -> Any:
    """Return the CUDA device `index`, or say what is missing.

    Parameters
    ----------
    index : int
        Number of the device, as CUDA counts them.

    Returns
    -------
    cupy.cuda.Device
        The device; a context manager that makes it the current one.

    Raises
    ------
    DeviceError
        If CuPy is not installed or cannot be loaded, if there is no CUDA driver, or if there
        is no device of that number.

    Examples
    --------
    >>> from geotucker_cupy import DeviceError, require_device
    >>> try:
    ...     device = require_device()
    ... except DeviceError as error:
    ...     message = str(error)  # what is missing and how to get it
    """
    cupy = _import_cupy()
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise DeviceError(
            f"CuPy is installed, but finds no usable CUDA driver or device ({error}). "
            "Check `nvidia-smi`; without a GPU use NumPy, JAX or PyTorch arrays"
        ) from error
    if not 0 <= index < count:
        raise DeviceError(f"index: expected a CUDA device from 0 to {count - 1}, got {index}")
    return cupy.cuda.Device(index)


def _import_cupy() -> ModuleType:
    try:
        return importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        raise DeviceError(
            "CuPy is not installed: pip install 'geotucker[cupy]' (built for CUDA 12; "
            "for other versions of CUDA install the CuPy package that fits)"
        ) from error
    except ImportError as error:
        raise DeviceError(f"CuPy is installed, but cannot be loaded: {error}") from error
