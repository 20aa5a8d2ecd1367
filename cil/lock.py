"""Who has a run folder: the name of its lock, and a look at it that takes it from nobody."""

import fcntl
import os
import struct
import sys
from pathlib import Path

LOCK = ".lock"

# struct flock of fcntl(2), in native alignment: its fields stand in another order on macOS and the BSDs.
_LINUX = sys.platform == "linux"
_LAYOUT = "hhqqi0q" if _LINUX else "qqihh0q"


def holder(folder: Path) -> int | None:
    """The process that runs in a folder, None if there is none; 0 for one that has no number here (another machine).

    It asks the system and locks nothing, so a run that starts at the same moment is not kept from it. Not for the
    process that has the lock itself: what it asks about is others, and closing the file would open its own lock.

    Raises:
        OSError: If the disk has no locks.
    """
    try:
        file = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        kind, whence = fcntl.F_WRLCK, os.SEEK_SET
        question = (kind, whence, 0, 0, 0) if _LINUX else (0, 0, 0, kind, whence)
        answer = struct.unpack(_LAYOUT, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(_LAYOUT, *question)))
    finally:
        os.close(file)
    found, process = (answer[0], answer[4]) if _LINUX else (answer[3], answer[2])
    return None if found == fcntl.F_UNLCK else max(int(process), 0)
