"""An exception as one clear line: what happened, where it is not ours also in which code."""

import errno
import traceback
from pathlib import Path

HINTS = {
    errno.ENOSPC: "free some space, or choose another --run_dir",
    errno.EDQUOT: "free some space, or choose another --run_dir",
    errno.EFBIG: "the limit on the size of files is reached; raise it, or choose another --run_dir",
    errno.EACCES: "change its permissions, or choose another --run_dir",
    errno.EPERM: "change its permissions, or choose another --run_dir",
    errno.EROFS: "choose a --run_dir that can be written",
    errno.ENOTDIR: "a folder is needed there, and a part of the path is a file",
    errno.EEXIST: "a folder is needed there, and it is a file",
    errno.EISDIR: "a file is needed there, and it is a folder",
    errno.ENOENT: "check the path",
}
"""What to try where the system refuses."""
DEBUG = "set LOWBIT_DEBUG=1 to see the way there"


def cause(error: BaseException) -> str:
    """What to say of an exception.

    Our own messages are ValueErrors and stay as they are. Others name their kind and the code that
    raised them; one without a text shows the line of code, such as the assertion that failed.
    """
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f" '{error.filename}'"
        hint = HINTS.get(error.errno or 0, DEBUG)
        return f"{error.strerror}:{place}; {hint}"
    from lightning_fabric.utilities.exceptions import MisconfigurationException  # takes seconds

    text = " ".join(str(error).split())
    if text and isinstance(error, ValueError | MisconfigurationException):
        return text
    return f"{type(error).__name__}{_origin(error)}: {text or 'without a text'}; {DEBUG}"


def _origin(error: BaseException) -> str:
    """The code that raised an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    last = frames[-1]
    where = "/".join(Path(last.filename).parts[-3:])
    return f" in {where}, line {last.lineno}, `{last.line}`"
