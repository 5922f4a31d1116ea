"""Where every file of the project is written: the old one stays until the new one is whole.

A new file is written beside the one it replaces, in the same folder and so on the same filesystem,
and put in its place when all of it is on the disk. Whatever happens meanwhile, a full disk or a
killed process, the name stands for a whole file: the old one or the new one. A killed process may
leave its unfinished part, whose name ends in `.part`; it is never read and may be deleted.
"""

import csv
import errno
import hashlib
import io
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP)
"""What filesystems answer that cannot sync a folder."""


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of the one at `path` when the block has ended.

    Where the block raises, the old file stays as it is.

    Raises:
        OSError: If the disk fails.
    """
    target = Path(os.path.realpath(path))  # a link goes on pointing to it
    part = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException as error:
        part.unlink(missing_ok=True)
        hidden = error.__context__
        if isinstance(error, RuntimeError) and isinstance(hidden, OSError):  # by torch
            raise hidden from None
        raise
    _sync_folder(target.parent)


def write(path: str | Path, content: str | bytes) -> None:
    """Replace a file by one with this content."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append(path: str | Path, size: int, content: bytes) -> int:
    """Add to a file, after cutting off what is behind its first bytes.

    So a table that grows is never written anew, and has no torn row: who writes it knows its size.

    Args:
        path: The file; made where there is none.
        size: Bytes of it that stay.
        content: What follows them.

    Returns:
        The new size.

    Raises:
        OSError: If the disk fails; the bytes that stay are as they were.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return size + len(content)


def csv_of(rows: Sequence[Mapping[str, Any]], *, header: bool = True) -> bytes:
    """Rows as CSV; the columns are the keys of the first one."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def seal(kind: str, body: bytes) -> bytes:
    """A body behind a line with its kind and its SHA-256, for files that are read back."""
    return f"{kind} {hashlib.sha256(body).hexdigest()}\n".encode() + body


def unseal(kind: str, content: bytes) -> bytes:
    """The body that was sealed.

    Raises:
        ValueError: If it is of another kind, or a byte of it is not as it was written.
    """
    line, _, body = content.partition(b"\n")
    if not line.startswith(f"{kind} ".encode()):
        raise ValueError(f"it is no {kind} file, it begins with {line[:24]!r}")
    if content != seal(kind, body):
        raise ValueError("it is damaged: its bytes do not match their hash")
    return body


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise
    finally:
        os.close(handle)
