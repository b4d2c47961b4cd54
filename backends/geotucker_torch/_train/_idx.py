"""MNIST and Fashion-MNIST: four idx files, plain or gzipped, checked by their published sums."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ._errors import DataError
from ._fetch import download, find, md5

__all__ = ["FASHION_MNIST", "MNIST", "IdxSource", "read_idx", "read_images_and_labels"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

# The idx format: two zero bytes, 8 for unsigned bytes, the number of dimensions, then the
# dimensions as big-endian 32-bit integers, then the entries (LeCun, Cortes, Burges).
_UNSIGNED_BYTES = b"\x00\x00\x08"

_PARTS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_SHAPES = ((60_000, 28, 28), (60_000,), (10_000, 28, 28), (10_000,))


@dataclass(frozen=True)
class IdxSource:
    """Four idx files and how to know them.

    Parameters
    ----------
    name : str
        Name of the data set in messages.
    url : str
        Address of the folder with the four ``.gz`` files.
    folders : tuple of str
        Sub-folders of the data folder to look in, in this order.
    packed : tuple of str
        MD5 sums of the published ``.gz`` files.
    plain : tuple of str
        MD5 sums of the unpacked files; empty where none were published. They let a file
        pass that was packed anew.
    """

    name: str
    url: str
    folders: tuple[str, ...]
    packed: tuple[str, ...]
    plain: tuple[str, ...] = ()


# Addresses and sums as torchvision uses them.
MNIST = IdxSource(
    "mnist",
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    ("mnist", "MNIST/raw", "."),
    (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    (
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ),
)
FASHION_MNIST = IdxSource(
    "fashion-mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    ("fashion-mnist", "FashionMNIST/raw", "."),
    (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
)


def read_images_and_labels(source: IdxSource, folder: Path | None) -> list[Array]:
    """Read training images, training labels, test images and test labels.

    Parameters
    ----------
    source : IdxSource
        `MNIST` or `FASHION_MNIST`.
    folder : Path or None
        Where the user's files lie; None downloads them.

    Returns
    -------
    list of numpy.ndarray
        uint8 arrays of shapes (60000, 28, 28), (60000,), (10000, 28, 28) and (10000,).

    Raises
    ------
    DataError
        If a file is missing, damaged, or not the published one.
    """
    arrays = []
    for index, part in enumerate(_PARTS):
        path = _locate(source, index, folder)
        array = read_idx(_checked(source, index, path), path)
        if array.shape != _SHAPES[index]:
            raise DataError(f"{path}: expected shape {_SHAPES[index]}, got {array.shape} ({part})")
        arrays.append(array)
    return arrays


def _locate(source: IdxSource, index: int, folder: Path | None) -> Path:
    """Return the path of one of the four files, in the user's folder or the cache."""
    part = _PARTS[index]
    if folder is None:
        return download(f"{source.url}/{part}.gz", f"md5:{source.packed[index]}")
    names = [f"{sub}/{part}{end}" for sub in source.folders for end in (".gz", "")]
    path = find(folder, names)
    if path is None:
        raise DataError(
            f"{folder}: {source.name} needs the file {source.folders[0]}/{part}.gz there; put it "
            f"there, or leave out --data-dir (and GEOTUCKER_DATA_DIR) to download it"
        )
    return path


def _checked(source: IdxSource, index: int, path: Path) -> bytes:
    """Return the unpacked bytes of a file whose packed or plain sum is the published one."""
    raw = path.read_bytes()
    is_packed = path.suffix == ".gz"
    try:
        plain = gzip.decompress(raw) if is_packed else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: not a whole gzip file ({error}); fetch it again, or leave out --data-dir "
            f"to download it"
        ) from error
    expected = [*source.packed[index : index + 1], *source.plain[index : index + 1]]
    if md5(plain) in expected or (is_packed and md5(raw) in expected):
        return plain
    if not is_packed and not source.plain:  # no sum was published for this form
        return plain
    raise DataError(
        f"{path}: its MD5 sum is none of the published ones ({', '.join(expected)}); fetch it "
        f"again, or leave out --data-dir to download it"
    )


def read_idx(data: bytes, path: Path) -> Array:
    """Return the array that an idx file holds.

    Parameters
    ----------
    data : bytes
        The unpacked file.
    path : Path
        Its name, for messages.

    Raises
    ------
    DataError
        If it is not an idx file of unsigned bytes or has another length than it says.

    Examples
    --------
    >>> read_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]), Path("labels")).tolist()
    [7, 8, 9]
    """
    if len(data) < 4 or data[:3] != _UNSIGNED_BYTES:
        raise DataError(f"{path}: not an idx file of unsigned bytes")
    order = data[3]
    start = 4 + 4 * order
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], dtype=">u4"))
    entries = np.frombuffer(data, dtype=np.uint8, offset=min(start, len(data)))
    if len(shape) != order or entries.size != int(np.prod(shape)):
        raise DataError(f"{path}: says shape {shape} but holds {entries.size} entries")
    return entries.reshape(shape).copy()
