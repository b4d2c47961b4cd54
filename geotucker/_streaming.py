"""Tensors larger than memory: ST-HOSVD and reconstruction piece by piece.

A mode is decomposed by its Gram matrix ``Mat_i Mat_i^T``, a sum over pieces of the tensor, in
float64. Its eigenvalues are the squares of the singular values, so that those below about 1e-8 of
the largest drown in rounding. Where a rule asks for such, the directions found so far are projected
out of the tensor and a further pass decomposes the rest, which is small itself: each pass gains
as many digits again, and the bound of the error holds at any tolerance.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from . import _ops
from ._errors import MemoryLimitError, NonFiniteError
from ._files import Floats, NpyFile, PathLike, replacing
from ._geometry import extend
from ._hosvd import as_mode_rule, choose_rank, cut_mode, drop_infeasible
from ._progress import bar
from ._ranks import ModeRule
from ._tensor import TuckerPoint, as_point, to_dense

__all__ = ["Decomposition", "decompose_file", "reconstruct_file"]

# Shares of the memory. Products and unfoldings copy a piece about six times over, the SVD of
# what is held in the end copies it about five times.
_PIECE, _HELD, _GRAM = 1 / 12, 1 / 8, 1 / 8

# Of the largest singular value. A Gram matrix knows values above the first well enough to decide
# on the rank. Vectors have an error of eps over the square; those above the second are good enough
# to be projected out: what is missed of them is as small as what the next pass can see.
_DECIDES, _KEEPS = 1e-6, 1e-3


class Decomposition(NamedTuple):
    """What `decompose_file` returns.

    Parameters
    ----------
    point : TuckerPoint
        NumPy arrays; float32 if the file's numbers are no finer, else float64.
    error : float
        The relative error ``||W - W_truncated|| / ||W||`` (of the decomposition in float64, before
        it is rounded to the result's dtype), measured and not estimated.
    passes : int
        How often the file was read.
    """

    point: TuckerPoint
    error: float
    passes: int


def decompose_file(
    path: PathLike, ranks: Any, *, memory: int = 2**30, progress: bool = False
) -> Decomposition:
    """Decompose the tensor in a .npy file, which may be larger than memory, by ST-HOSVD.

    Parameters
    ----------
    path : path
        A file of `numpy.save`: floating numbers of up to 64 bits, integers or booleans, in C or
        Fortran order.
    ranks : ModeRule, int, float or tuple
        With ``Tolerance(tau)`` the error is at most ``tau ||W||``, also for small tau.
    memory : int
        Bytes that arrays may take.
    progress : bool
        Show a progress bar for each pass over the file (needs the package rich).

    Returns
    -------
    Decomposition

    Raises
    ------
    FileFormatError, BackendError, ShapeError
        If the file holds no tensor of real numbers.
    RankError
        For ranks that cannot be used, or rules that need the spectra of all modes at once.
    NonFiniteError
        If an entry is NaN or infinite, or the norm is beyond the result's dtype.
    MemoryLimitError
        If the memory does not suffice: for a piece of the tensor, or for what is left of it once
        all modes that can be read piece by piece are truncated.

    References
    ----------
    Vannieuwenhoven, Vandebril, Meerbergen. A new truncation strategy for the higher-order
    singular value decomposition. SIAM J. Sci. Comput. 34 (2012), Theorem 6.5.

    Examples
    --------
    >>> import numpy as np, geotucker as gt, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "data.npy")
    >>> np.save(path, np.add.outer(np.arange(30.0), np.arange(40.0)))
    >>> result = gt.decompose_file(path, gt.Tolerance(1e-8))
    >>> result.point.ranks, result.error < 1e-8, result.passes
    ((2, 2), True, 1)
    """
    rule = as_mode_rule(ranks, "decompose_file")
    file = NpyFile(path)
    if file.fortran:
        rule = _Reversed(rule)
    core, factors, error, passes = _Streamed(file, rule, memory, progress).decompose()
    if file.fortran:
        core, factors = core.transpose(), factors[::-1]
    arrays = (np.ascontiguousarray(array, dtype=file.dtype) for array in (core, *factors))
    return Decomposition(TuckerPoint(next(arrays), tuple(arrays)), error, passes)


class _Reversed(ModeRule):
    """A rule for a tensor that is read with its modes in reverse."""

    def __init__(self, rule: ModeRule) -> None:
        self._rule = rule

    def mode_rank(
        self, values: Any, mode: int, shape: Sequence[int], previous: int | None = None
    ) -> int:
        """Ask the rule, in the modes that it knows."""
        return self._rule.mode_rank(values, len(shape) - 1 - mode, shape[::-1], previous)


Pieces: TypeAlias = Callable[[], Iterator[Floats]]


class _Streamed:
    """One decomposition: the bases of the modes that have been truncated, and the passes taken.

    The leading axes are walked through; a piece is some of their entries and all of the axes
    behind, whose modes can be decomposed piece by piece. The others follow in memory.
    """

    def __init__(self, file: NpyFile, rule: ModeRule, memory: int, progress: bool) -> None:
        self.file, self.rule, self.memory, self.progress = file, rule, memory, progress
        self.shape = file.shape
        self.bases: dict[int, Floats] = {}
        self.passes = 0
        self.lead = self._leading_axes()

    def decompose(self) -> tuple[Floats, list[Floats], float, int]:
        """Return core, factors, relative error and the number of passes."""
        self._truncate_in_pieces()
        held, error, norm = self._hold()
        limit = float(np.finfo(self.file.dtype).max)
        if not norm <= limit:
            raise NonFiniteError(
                f"{self.file.path}: expected a norm of at most {limit:.1e}, the largest number of "
                f"{self.file.dtype}, got {norm:.1e}; scale the tensor"
            )
        factors = dict(self.bases)
        for mode in range(len(self.shape)):
            if mode not in self.bases:
                held, factors[mode], tail = cut_mode(held, mode, self.rule, self.shape)
                error = math.hypot(error, tail)  # each cut is orthogonal to those before
        core, ordered = drop_infeasible(held, [factors[mode] for mode in range(len(self.shape))])
        return core, list(ordered), error / norm if norm > 0.0 else 0.0, self.passes

    def _leading_axes(self) -> int:
        """Return how many axes are walked through: as few as give pieces that fit."""
        if self._bytes(self.shape) <= self.memory * _HELD:
            return 0
        for lead in range(1, len(self.shape)):
            if self._bytes(self.shape[lead:]) <= self.memory * _PIECE:
                return lead
        raise MemoryLimitError(
            f"memory: a piece of a tensor of shape {self.shape} takes at least "
            f"{self._bytes(self.shape[-1:])} bytes, and {self.memory} bytes leave room for "
            f"{int(self.memory * _PIECE)}"
        )

    @staticmethod
    def _bytes(shape: Sequence[int]) -> int:
        return 8 * math.prod(shape)

    def _kept(self) -> list[int]:
        """Return the shape of what truncation in pieces has left."""
        return [
            self.bases[mode].shape[1] if mode in self.bases else n
            for mode, n in enumerate(self.shape)
        ]

    def _truncate_in_pieces(self) -> None:
        """Truncate modes, the largest first, until the rest fits into memory."""
        fitting = [
            mode
            for mode in range(self.lead, len(self.shape))
            if self._bytes([self.shape[mode]] * 2) <= self.memory * _GRAM
        ]
        waiting = sorted(fitting, key=lambda mode: self.shape[mode])
        while self.lead and self._bytes(self._kept()) > self.memory * _HELD:
            if not waiting:
                raise MemoryLimitError(
                    f"memory: {self._bytes(self._kept())} bytes are left of the tensor after the "
                    f"modes that can be read in pieces were truncated to {self._kept()}, and "
                    f"{self.memory} bytes leave room for {int(self.memory * _HELD)}; lower the "
                    "ranks, or allow more memory"
                )
            mode = waiting.pop()
            self.bases[mode] = self._basis(mode)

    def _pieces(self, label: str) -> Iterator[tuple[slice, Floats]]:
        """Yield the rows of leading entries and the piece itself; one pass over the file."""
        self.passes += 1
        rest = self.shape[self.lead :]
        row, rows = math.prod(rest), math.prod(self.shape[: self.lead])
        step = max(1, int(self.memory * _PIECE) // self._bytes(rest)) if self.lead else 1
        with bar(f"pass {self.passes}", rows, self.progress) as advance:
            for first in range(0, rows, step):
                last = min(first + step, rows)
                piece = self.file.read(first * row, last * row)
                if not np.isfinite(piece).all():
                    raise NonFiniteError(
                        f"{self.file.path}: expected finite numbers, got NaN or infinity among "
                        f"the entries {first * row} to {last * row - 1}"
                    )
                yield slice(first, last), piece.reshape(-1, *rest)
                advance(last - first, f"pass {self.passes}, {label}")

    def _project(self, piece: Floats, transpose: bool = True) -> Floats:
        """Apply the bases' transposes, or the bases, to the axes behind the leading ones."""
        for mode, basis in self.bases.items():
            piece = _ops.mode_product(piece, basis, mode - self.lead + 1, transpose)
        return piece

    def _basis(self, mode: int) -> Floats:
        """Return the leading left singular vectors of a mode of what truncation has left."""
        n = self.shape[mode]
        basis, found, size = np.zeros((n, 0)), np.zeros(0), 0.0
        while True:
            squares, vectors = np.linalg.eigh(self._gram(mode, basis))
            # Rounding makes noise of either sign: better too large a tail than too small a one.
            values = np.sqrt(np.abs(squares[::-1]))
            size = max(size, float(values[0]))
            spectrum = np.concatenate([found, values])[:n]
            rank = choose_rank(self.rule, spectrum, mode, self.shape)
            decided = len(found) + int(np.sum(values > _DECIDES * values[0]))
            nothing_left = values[0] <= n * _ops.eps(values) * size
            last = nothing_left or rank <= decided
            kept = int(np.sum(values > _KEEPS * values[0]))
            count = max(rank - len(found), 0) if last else kept
            (extended,) = extend([(basis, vectors[:, ::-1][:, :count])])
            assert extended is not None  # all is finite
            basis, _ = extended
            if last:
                leading: Floats = basis[:, :rank]
                return leading
            found = spectrum[: len(found) + count]

    def _gram(self, mode: int, basis: Floats) -> Floats:
        """Return the Gram matrix of a mode of the tensor without what `basis` holds."""
        n = self.shape[mode]
        gram, largest = np.zeros((n, n)), 0.0
        for _, piece in self._pieces(f"mode {mode}"):
            largest = max(largest, _ops.max_abs(piece))
            unfolded = _ops.unfold(self._project(piece), mode - self.lead + 1)
            if basis.shape[1]:
                unfolded = unfolded - basis @ (basis.T @ unfolded)
            gram += unfolded @ unfolded.T
        if not np.isfinite(gram).all() or 0.0 < largest < 1e-140:
            raise NonFiniteError(
                f"{self.file.path}: the largest entry is {largest:.1e}, and its square leaves the "
                "range of float64; scale the tensor"
            )
        return gram

    def _hold(self) -> tuple[Floats, float, float]:
        """Return what truncation has left, the norm of what it took, and that of the whole."""
        rows = math.prod(self.shape[: self.lead])
        kept = self._kept()
        held = np.empty((rows, *kept[self.lead :]))
        error = norm = 0.0
        for where, piece in self._pieces("projection"):
            held[where] = self._project(piece)
            norm = math.hypot(norm, _ops.norm(piece))
            if self.bases:  # measured: the difference of two norms would lose half of the digits
                rest = piece - self._project(held[where], transpose=False)
                error = math.hypot(error, _ops.norm(rest))
        return held.reshape(kept), error, norm


def reconstruct_file(
    point: Any,
    path: PathLike,
    *,
    memory: int = 2**30,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write the full tensor to a .npy file, piece by piece.

    Parameters
    ----------
    point : pair
        Any ``(core, factors)``; of bfloat16, which NumPy lacks, the file is float32.
    path : path
        The file to write, which appears when it is complete.
    memory : int
        Bytes that a piece and its intermediate products may take, as far as one row of the last
        mode allows.
    overwrite : bool
        Whether a file of this name may be replaced.
    progress : bool
        Show a progress bar (needs the package rich).

    Raises
    ------
    FileExistsError
        If there is such a file and it must not be overwritten.
    ShapeError, BackendError, NonFiniteError
        If it is no Tucker tensor, as for `as_point`.

    Examples
    --------
    >>> import numpy as np, geotucker as gt, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "ones.npy")
    >>> gt.reconstruct_file(gt.hosvd(np.ones((3, 4)), 1), path)
    >>> np.allclose(np.load(path), 1.0)
    True
    """
    point = as_point(point)
    numpy_point = TuckerPoint(
        _ops.to_numpy(point.core), tuple(_ops.to_numpy(u) for u in point.factors)
    )
    header = {
        "descr": np.lib.format.dtype_to_descr(numpy_point.core.dtype),
        "fortran_order": False,
        "shape": point.shape,
    }
    rows = math.prod(point.shape[:-1])
    with replacing(path, overwrite) as file, bar("reconstruct", rows, progress) as advance:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in _dense_pieces(numpy_point, int(memory * _PIECE)):
            file.write(np.ascontiguousarray(piece).data)
            advance(piece.size / point.shape[-1], "reconstruct")


def _dense_pieces(point: TuckerPoint, limit: int) -> Iterator[Floats]:
    """Yield the entries in C order, about `limit` bytes at a time."""
    first, *others = point.factors
    row = point.core.itemsize * math.prod(point.shape[1:])
    if row <= limit or not others:
        step = max(1, limit // row)
        for start in range(0, len(first), step):
            yield to_dense((point.core, (first[start : start + step], *others)))
        return
    for weights in first:
        yield from _dense_pieces(
            TuckerPoint(np.tensordot(weights, point.core, 1), tuple(others)), limit
        )
