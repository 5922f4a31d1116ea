"""A lock on a folder, which ends with the process that holds it."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

NAME = ".lock"
HELD = (errno.EAGAIN, errno.EACCES)
"""What the system says of a lock that another process holds."""
UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What it says on a filesystem without locks; there the folder is not locked."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder within the block. What a killed process has left there does not count.

    Raises:
        ValueError: If another process holds it.
        OSError: If the folder cannot be written.
    """
    path = folder / NAME
    file = _taken(path)
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _taken(path: Path) -> TextIO:
    """The file of a lock, open and locked."""
    while True:
        file = open(path, "a+")  # noqa: SIM115 - open as long as the lock is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers do not inherit it
        except OSError as error:
            if error.errno in UNKNOWN:
                return file
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if error.errno not in HELD:
                raise
            raise ValueError(
                f"run folder '{path.parent}' is in use by {holder}; wait for its end, or choose "
                "another --run_dir"
            ) from None
        if os.fstat(file.fileno()).st_nlink:  # else its holder has removed it meanwhile
            return file
        file.close()
