"""Version of geotucker, read by the build."""

__all__ = ["__version__"]

__version__ = "0.1.0"
