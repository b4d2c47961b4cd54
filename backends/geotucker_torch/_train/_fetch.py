"""Where a data set's files come from: a folder of the user's, or a checked download."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ._errors import DataError, OptionError

__all__ = ["DATA_DIR_VARIABLE", "data_folder", "download", "find", "md5"]

DATA_DIR_VARIABLE = "GEOTUCKER_DATA_DIR"


def data_folder(option: str | None) -> Path | None:
    """Return the folder that the user's data lies in, or None to download.

    Parameters
    ----------
    option : str or None
        The value of ``--data-dir``. Without it the environment variable
        ``GEOTUCKER_DATA_DIR`` is asked.

    Raises
    ------
    OptionError
        If the folder does not exist.
    """
    value = option or os.environ.get(DATA_DIR_VARIABLE)
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        source = "--data-dir" if option else f"environment variable {DATA_DIR_VARIABLE}"
        raise OptionError(source, value, "an existing folder (leave it out to download the data)")
    return folder


def find(folder: Path, candidates: Iterable[str]) -> Path | None:
    """Return the first of the relative paths that exists under a folder, or None."""
    for candidate in candidates:
        if (folder / candidate).exists():
            return folder / candidate
    return None


def download(url: str, checksum: str) -> Path:
    """Download a file into the user's cache, once, and check it.

    Parameters
    ----------
    url : str
        Address of the file.
    checksum : str
        ``"md5:<hex>"`` or ``"sha256:<hex>"``, as pooch takes it.

    Returns
    -------
    Path
        The file in the cache.

    Raises
    ------
    DataError
        If there is no network, the server refuses, or the checksum is another one.
    """
    import pooch  # here: a run on the user's own files, or on digits, does without

    name = url.rsplit("/", 1)[-1]
    pooch.get_logger().setLevel("WARNING")
    try:
        # a file of its own per checksum: MNIST and Fashion-MNIST use the same names
        fname = f"{checksum.split(':')[-1][:8]}-{name}"
        cache = pooch.os_cache("geotucker")
        return Path(pooch.retrieve(url, known_hash=checksum, fname=fname, path=cache))
    except OSError as error:  # errors of the network are of this kind too
        raise DataError(
            f"could not download {url} ({type(error).__name__}): check the network, or fetch "
            f"{name} by other means and pass the folder that holds it as --data-dir"
        ) from error
    except ValueError as error:  # what pooch raises when the hash does not match
        raise DataError(
            f"the file downloaded from {url} does not have the published checksum {checksum}: "
            f"try again later, or pass a folder with {name} as --data-dir"
        ) from error


def md5(data: bytes) -> str:
    """Return the MD5 sum that data sets are published with; it guards against damage only."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
