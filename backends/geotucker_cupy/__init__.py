"""Binding for CuPy: tells whether there is a GPU that CuPy can use.

CuPy arrays need no other door than the core itself: `geotucker` recognises them by their
type and computes where they lie, on the current device. What this package adds is a check that
says, before any work begins, what is missing.
"""

from ._device import DeviceError, require_device

__all__ = ["DeviceError", "require_device"]
