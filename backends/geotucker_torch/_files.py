"""Files that are either whole or not there, at whatever moment the process ends."""

from pathlib import Path

import torch.distributed as dist

from geotucker._files import replacing

__all__ = ["write_atomically"]


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by new content in one step, as `geotucker._files.replacing` does.

    Processes that train together may write one file at the same time, and a process that is killed
    and started again finds what it left.

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
    together = dist.is_available() and dist.is_initialized()
    with replacing(path, overwrite=True, writer=dist.get_rank() if together else 0) as file:
        file.write(data)
