"""Pictures and pages of what `geotucker_torch.spectra` measures."""

from ._plot import plot
from ._report import report

__all__ = ["plot", "report"]
