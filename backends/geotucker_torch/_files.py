"""Files that are either whole or not there, at whatever moment the process ends."""

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by new content in one step.

    The data goes to a hidden file beside the target, down to the disk, and then takes the
    target's name: a reader sees the old content or the new, and a killed process leaves at
    most the hidden file, which the next write overwrites. A write that fails leaves none. A link
    stays a link.

    Parameters
    ----------
    path : Path
        The file to write; its folder exists.
    data : bytes
        The whole content.

    Raises
    ------
    OSError
        If the folder cannot be written or the disk is full. The old file is untouched.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "config.json"
    >>> write_atomically(target, b"{}")
    >>> target.read_bytes()
    b'{}'
    """
    path = path.resolve()
    partial = path.with_name(f".{path.name}.part")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut; Windows has no such call."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
