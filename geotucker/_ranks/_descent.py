"""A truncation that costs no more than a share of what the step gains."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .._errors import RankError
from ._base import Ranks, Spectrum, check_bounds, clip, smallest_rank, tail_norms

__all__ = ["DescentSafe"]


@dataclass(frozen=True)
class DescentSafe:
    """Smallest ranks whose truncation error the step's own descent pays for.

    A step from W to W + S with the gradient G predicts that the loss falls by ``-<G, S>``. A
    truncation error E changes the loss by ``<G, E>`` to first order, which is at most
    ``||G|| ||E||`` (Cauchy-Schwarz). So with the allowance ``a = max(0, -<G, S>) / ||G||`` an
    error of at most ``theta a`` never costs more than the share theta of the predicted descent:
    Theorem 3.1 of arXiv:2305.19059, ``L(W_1) <= L(W_0) - alpha lr + beta tau``, with tau chosen
    in each step so that the last term is a share of the one before. Each of the d modes may drop
    a tail of norm ``theta a / sqrt(d)``.

    With steps ``S = -lr G`` of `TDLRT` and a gradient of Lipschitz constant l the second order is
    paid for as well: the loss falls in every step as long as ``lr l < 2 / (1 + theta)``, which is
    4/3 for the default.

    The integrators supply the allowance. That of `TDLRT` is exact to first order: its errors lie
    in the bases in which G is known. `Tangent` knows the tangential part of G only, and the
    other part is left out.

    Near a minimum the allowance falls to 0 and ranks stay, or double in each step where every
    direction carries something: give a cap.

    Parameters
    ----------
    theta : float
        Share in (0, 1) of the predicted descent that truncation may cost.
    floor : int
        No mode goes below this rank (or its dimension).
    cap : int, optional
        No mode goes above this rank. A cap that acts voids the guarantee.

    Raises
    ------
    RankError
        If a value is out of its range, or a spectrum comes without a usable allowance.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.diag([4.0, 2.0, 0.1]), 3)
    >>> cut, = gt.truncate([point], gt.DescentSafe(), [gt.Facts(allowance=0.3)])
    >>> cut.point.ranks
    (2, 2)
    """

    theta: float = 0.5
    floor: int = 1
    cap: int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0.0 < self.theta < 1.0:
            raise RankError(f"theta: expected a number in (0, 1), got {self.theta}")
        check_bounds(self.floor, self.cap)

    def __call__(self, spectra: Sequence[Spectrum], /) -> list[Ranks]:
        """Return the ranks of every tensor, each by its own allowance."""
        return [self._ranks(number, spectrum) for number, spectrum in enumerate(spectra)]

    def _ranks(self, number: int, spectrum: Spectrum) -> Ranks:
        allowance = spectrum.facts.allowance
        if allowance is None:
            raise RankError(
                f"ranks: DescentSafe needs the allowance of the step, got none for tensor {number} "
                f"of shape {spectrum.shape}. An integrator's step supplies it; for a truncation "
                "without a step use Tolerance, or pass facts=[Facts(allowance=...)] to truncate"
            )
        if not 0.0 <= allowance < math.inf:
            raise RankError(
                f"allowance: expected a finite number of at least 0, got {allowance} for tensor "
                f"{number} of shape {spectrum.shape}"
            )
        allowed = self.theta * allowance / math.sqrt(len(spectrum.shape))
        return tuple(
            clip(smallest_rank(tail_norms(values), allowed), self.floor, self.cap, len(values))
            for values in spectrum.values
        )
