"""Files: arrays read piece by piece, Tucker tensors saved and loaded, nothing half-written."""

import errno
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, TypeAlias
from zipfile import BadZipFile

import numpy as np

from . import _ops
from ._errors import BackendError, FileFormatError, ShapeError
from ._tensor import TuckerPoint, as_point

__all__ = ["NpyFile", "PathLike", "load", "replacing", "save", "sync_folder", "write"]

PathLike: TypeAlias = "str | os.PathLike[str]"

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


class NpyFile:
    """A file of `numpy.save`, read in pieces by plain reads.

    A memory map would count against limits of the address space, and its pages against the
    memory that the process is seen to use.

    Parameters
    ----------
    path : path
        Real numbers in C or Fortran order. Integers and booleans are converted as they are read.

    Raises
    ------
    FileFormatError
        If it is no such file, or is shorter than its header says.
    BackendError
        For complex and other dtypes that are no real numbers, and for long doubles.
    ShapeError
        If there are no modes or no entries.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            shape, self.fortran, self.stored = _header(file, self.path)
            self._offset = file.tell()
        _check_stored(self.path, shape, self.stored)
        # Fortran order is C order of the transposed tensor.
        self.shape = shape[::-1] if self.fortran else shape
        missing = self._offset + math.prod(shape) * self.stored.itemsize - os.path.getsize(path)
        if missing > 0:
            raise FileFormatError(f"{path}: the file is cut off, {missing} bytes are missing")

    @property
    def dtype(self) -> "np.dtype[Any]":
        """The dtype of results: float32 for what is no finer, else float64."""
        single = self.stored.kind == "f" and self.stored.itemsize <= 4
        return np.dtype(np.float32 if single else np.float64)

    def read(self, first: int, last: int) -> Floats:
        """Return the entries from `first` to before `last`, in the order of the file."""
        offset = self._offset + first * self.stored.itemsize
        entries = np.fromfile(self.path, self.stored, last - first, offset=offset)
        return entries.astype(np.float64, copy=False)


def _header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, "np.dtype[Any]"]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }  # version 3 is for names of fields, which numbers have none of
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = readers[version](file)
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}")
    except (KeyError, SyntaxError, ValueError, TokenError) as error:
        raise FileFormatError(
            f"{path}: expected a .npy file, an array of numbers saved by numpy.save"
        ) from error
    return shape, fortran, dtype


def _check_stored(path: Path, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> None:
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise BackendError(
            f"{path}: expected real numbers of at most 64 bits, got {dtype}"
            + ("; decompose its real and imaginary parts" if dtype.kind == "c" else "")
        )
    if not shape or 0 in shape:
        raise ShapeError(f"{path}: expected a tensor with at least one entry, got shape {shape}")


@contextmanager
def replacing(
    path: PathLike, overwrite: bool = False, writer: int | None = None
) -> Iterator[IO[bytes]]:
    """Yield a hidden file beside `path` that takes its place when all has been written.

    Whatever ends the process, `path` holds what it held before or all that is new. What fails
    leaves no hidden file; a process that is killed does, and a `writer` that is started again
    writes over its own. A link stays a link, and a file that is private stays so.

    Parameters
    ----------
    path : path
        The file; its folder exists.
    overwrite : bool
        Whether there may be such a file already.
    writer : int, optional
        In the hidden file's name: who writes at the same time has another. By default a random
        number, so that threads may write at the same time: the last one to end wins.

    Raises
    ------
    FileExistsError
        If there is such a file, unless it may be overwritten; or a device.
    IsADirectoryError, FileNotFoundError
        If it is a folder, or its folder does not exist.
    OSError
        If the folder cannot be written or the disk is full.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "config.json"
    >>> with replacing(target) as file:
    ...     _ = file.write(b"{}")
    >>> target.read_bytes()
    b'{}'
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{path}: expected the name of a file, got a folder")
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{path}: expected the name of a file, got a device or the like")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already; choose another name or allow to overwrite")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {target.parent}; make it first")
    own = secrets.token_hex(8) if writer is None else writer
    # Of a long name the end, so that the hidden one is no longer than names may be.
    beside = target.with_name(f".{target.name[-50:]}.{own}.part")
    try:
        with beside.open("wb") as file:
            if target.exists():
                shutil.copymode(target, beside)  # before there is anything to read
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut, where that can be asked for.

    Not on Windows, not of some file systems on a network, and not in a folder that may be written
    to but not read. The new file is there all the same.
    """
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def save(path: PathLike, point: Any, overwrite: bool = False) -> None:
    """Save a Tucker tensor as a .npz file, of which `numpy.load` reads the parts as well.

    Parameters
    ----------
    path : path
        Its name is taken as it is; the command line uses the ending ``.tucker.npz``.
    point : pair
        Any ``(core, factors)``, saved as ``core``, ``factor_0``, ``factor_1``, ... ; bfloat16,
        which NumPy lacks, as float32.
    overwrite : bool
        Whether a file of this name may be replaced, which happens all at once or not at all.

    Raises
    ------
    FileExistsError
        If there is such a file and it must not be overwritten.
    ShapeError, BackendError, NonFiniteError
        If it is no Tucker tensor, as for `as_point`.

    Examples
    --------
    >>> import numpy as np, geotucker as gt, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "ones.tucker.npz")
    >>> gt.save(path, gt.hosvd(np.ones((3, 4)), 1))
    >>> gt.load(path).shape
    (3, 4)
    """
    point = as_point(point)
    with replacing(path, overwrite) as file:
        write(file, point)


def write(file: IO[bytes], point: TuckerPoint) -> None:
    """Write a point to an open file, in the format of `save`."""
    parts: dict[str, Any] = {"core": _ops.to_numpy(point.core)}
    for mode, factor in enumerate(point.factors):
        parts[f"factor_{mode}"] = _ops.to_numpy(factor)
    np.savez(file, **parts)


def load(path: PathLike) -> TuckerPoint:
    """Load a Tucker tensor that `save` or ``geotucker decompose`` wrote, as NumPy arrays.

    Raises
    ------
    FileFormatError
        If the file holds no Tucker tensor.
    ShapeError, BackendError, NonFiniteError
        If its arrays do not fit together or are not finite.

    Examples
    --------
    >>> import geotucker as gt
    >>> gt.load("missing.tucker.npz")
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    try:
        with Path(path).open("rb") as file:
            parts = np.load(file, allow_pickle=False)
            if not isinstance(parts, np.lib.npyio.NpzFile):
                raise ValueError("one array, not several")
            names = [f"factor_{mode}" for mode in range(len(parts.files) - 1)]
            core, factors = parts["core"], tuple(parts[name] for name in names)
    except (EOFError, KeyError, OSError, RuntimeError, ValueError, BadZipFile, zlib.error) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # no fault of the content, unlike a place before the file's beginning
        raise FileFormatError(
            f"{path}: expected a Tucker tensor: a .npz file of core, factor_0, factor_1, ..."
        ) from error
    return as_point((core, factors), str(path))
