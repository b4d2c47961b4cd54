"""CIFAR-10: the published python and binary forms, and a JPEG copy of it."""

import codecs
import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ._errors import DataError
from ._fetch import download, find, md5

__all__ = ["decode_jpegs", "read_cifar10"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
Read: TypeAlias = Callable[[str], bytes]

# The binary form is the one to download: reading it never unpickles anything.
_BINARY_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_BINARY_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # published beside the file
_RECORD = 1 + 3 * 32 * 32  # a label, then 1024 red, 1024 green and 1024 blue bytes
_PER_BATCH = 10_000

# MD5 sums of the python form's members, as torchvision checks them.
_PYTHON_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_BINARY_FOLDERS = ("cifar-10-batches-bin", "cifar10/cifar-10-batches-bin")
_PYTHON_FOLDERS = ("cifar-10-batches-py", "cifar10/cifar-10-batches-py")
_BINARY_ARCHIVES = ("cifar-10-binary.tar.gz", "cifar10/cifar-10-binary.tar.gz")
_PYTHON_ARCHIVES = ("cifar-10-python.tar.gz", "cifar10/cifar-10-python.tar.gz")
_JPEG_FILES = ("cifar10-jpeg/cifar10_jpeg_q75.npz", "cifar10_jpeg_q75.npz")


def read_cifar10(folder: Path | None) -> tuple[str, list[Array]]:
    """Read CIFAR-10 in whichever form the folder holds, lossless forms first.

    Parameters
    ----------
    folder : Path or None
        Where the user's files lie; None downloads the binary form.

    Returns
    -------
    name : str
        ``"cifar10"``, or ``"cifar10 (JPEG copy)"``: results on the lossy copy are not
        CIFAR-10 results and must not be called so.
    arrays : list of numpy.ndarray
        Training images (50000, 3, 32, 32), training labels (50000,), test images and test
        labels; uint8.

    Raises
    ------
    DataError
        If no form is there, or a file is damaged or not the published one.
    """
    if folder is None:
        return "cifar10", _from_binary_archive(download(_BINARY_URL, f"md5:{_BINARY_MD5}"))
    if path := find(folder, _BINARY_FOLDERS):
        return "cifar10", _stack(_binary_batches(_folder_reader(path), path))
    if path := find(folder, _PYTHON_FOLDERS):
        return "cifar10", _stack(_python_batches(_folder_reader(path), path))
    if path := find(folder, _BINARY_ARCHIVES):
        return "cifar10", _from_binary_archive(path)
    if path := find(folder, _PYTHON_ARCHIVES):
        with _open_archive(path) as archive:
            return "cifar10", _stack(_python_batches(_archive_reader(archive), path))
    if path := find(folder, _JPEG_FILES):
        return "cifar10 (JPEG copy)", _from_jpegs(path)
    forms = (_BINARY_FOLDERS[0], _PYTHON_FOLDERS[0], _BINARY_ARCHIVES[0], _PYTHON_ARCHIVES[0])
    raise DataError(
        f"{folder}: cifar10 needs one of {', '.join(forms)} there; put one there, or leave out "
        f"--data-dir (and GEOTUCKER_DATA_DIR) to download it"
    )


def _stack(batches: list[tuple[Array, Array]]) -> list[Array]:
    """Join five training batches; the sixth is the test set."""
    *training, (test_images, test_labels) = batches
    images = np.concatenate([images for images, _ in training])
    labels = np.concatenate([labels for _, labels in training])
    return [images, labels, test_images, test_labels]


def _folder_reader(folder: Path) -> Read:
    """Return a function that reads a member of an unpacked archive."""

    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{folder / name}: cannot be read ({error.strerror})") from error

    return read


def _archive_reader(archive: tarfile.TarFile) -> Read:
    """Return a function that reads a member of an archive without unpacking it to disk."""
    members = {member.name.rsplit("/", 1)[-1]: member for member in archive if member.isfile()}

    def read(name: str) -> bytes:
        file = archive.extractfile(members[name]) if name in members else None
        if file is None:
            raise DataError(f"{archive.name!r}: holds no {name}; fetch it again")
        return file.read()

    return read


@contextmanager
def _open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a packed archive, or say that it is damaged."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            yield archive
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{path}: not a whole archive ({error}); fetch it again") from error


def _from_binary_archive(path: Path) -> list[Array]:
    """Read the six members of the binary archive after checking its published sum."""
    if md5(path.read_bytes()) != _BINARY_MD5:
        raise DataError(f"{path}: its MD5 sum is not the published {_BINARY_MD5}; fetch it again")
    with _open_archive(path) as archive:
        return _stack(_binary_batches(_archive_reader(archive), path))


def _binary_batches(read: Read, path: Path) -> list[tuple[Array, Array]]:
    """Read the binary form: records of a label and an image."""
    batches = []
    for name in _PYTHON_MD5:  # the members have the same names, plus ".bin"
        records = np.frombuffer(read(f"{name}.bin"), dtype=np.uint8)
        if records.size != _PER_BATCH * _RECORD:
            raise DataError(
                f"{path}: {name}.bin has {records.size} bytes, expected {_PER_BATCH * _RECORD}; "
                f"fetch it again"
            )
        records = records.reshape(_PER_BATCH, _RECORD)
        images = records[:, 1:].reshape(_PER_BATCH, 3, 32, 32).copy()
        batches.append((images, _labels(records[:, 0], path)))
    return batches


def _python_batches(read: Read, path: Path) -> list[tuple[Array, Array]]:
    """Read the python form: pickled dictionaries, each checked before it is unpickled."""
    batches = []
    for name, checksum in _PYTHON_MD5.items():
        data = read(name)
        if md5(data) != checksum:
            raise DataError(
                f"{path}: the MD5 sum of {name} is not the published {checksum}; fetch it again"
            )
        batch = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
        images = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        batches.append((images, _labels(batch[b"labels"], path)))
    return batches


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that builds NumPy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the names that a pickled array mentions, in any NumPy version."""
        reconstruct = np.empty(0).__reduce__()[0]
        allowed = {"_reconstruct": reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.split(".")[0] == "numpy" and name in allowed:
            return allowed[name]
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 pickles them
            return codecs.encode
        raise pickle.UnpicklingError(f"{module}.{name} has no place in CIFAR-10")


def _from_jpegs(path: Path) -> list[Array]:
    """Read the JPEG copy: one npz whose images share a header.

    It holds ``header``, ``scan`` (the entropy-coded data of all images, one after another),
    ``length`` (bytes per image), ``label`` and ``n_train``; training images come first.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        header, scan = content["header"].tobytes(), content["scan"].tobytes()
        length, n_train = content["length"].astype(np.int64), int(content["n_train"])
        labels = _labels(content["label"], path)
        ends = np.cumsum(length)
        scans = [scan[end - size : end] for end, size in zip(ends, length, strict=True)]
        images = decode_jpegs(header, scans)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a whole JPEG copy of CIFAR-10 ({error})") from error
    return [images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]]


def decode_jpegs(header: bytes, scans: list[bytes]) -> Array:
    """Decode 32x32 colour images that share one JPEG header.

    Parameters
    ----------
    header : bytes
        Everything before the entropy-coded data.
    scans : list of bytes
        The entropy-coded data of each image, without the end marker.

    Returns
    -------
    numpy.ndarray
        uint8 array of shape (len(scans), 3, 32, 32).
    """
    from PIL import Image  # here: no other data set needs it

    images = np.empty((len(scans), 32, 32, 3), dtype=np.uint8)
    for image, scan in zip(images, scans, strict=True):
        with Image.open(io.BytesIO(header + scan + b"\xff\xd9")) as picture:
            image[...] = np.asarray(picture)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _labels(values: Any, path: Path) -> Array:
    """Return labels as an array after checking that they name ten classes."""
    labels = np.array(values, dtype=np.uint8)
    if labels.size and labels.max() > 9:
        raise DataError(f"{path}: holds the label {labels.max()}, expected 0 to 9; fetch it again")
    return labels
