"""Files and folders that nobody but this user can have written: what is read from them decides what is generated.

Where a system has neither owners nor modes (Windows), they are trusted as they are.
Cost: two system calls per look at a folder, three to open a file.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

# neither waits (for a writer of a pipe) nor follows a link
READING = os.O_RDONLY
for _name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY"):
    READING |= getattr(os, _name, 0)
# a link, another user's, a socket, a device without a driver
NOT_TO_BE_OPENED = (errno.ELOOP, errno.EMLINK, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EOPNOTSUPP, errno.ENODEV)


def make_folder(folder: Path) -> None:
    """Create a folder, and those that it lies in, as far as they are missing, for this user only. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def distrust(folder: Path) -> str | None:
    """Return why others decide what is in a folder and what to do about it, None if they do not. Raises OSError."""
    if not hasattr(os, "geteuid"):
        return None
    user, link, found = os.geteuid(), os.lstat(folder), os.stat(folder)
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (user, 0):
        return f"it is a link that belongs to another user (uid {link.st_uid}). Name the folder itself"
    if found.st_uid != user:
        return f"it belongs to another user (uid {found.st_uid}, this process is of {user}). Name a folder of your own"
    if found.st_mode & 0o022:
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        return f"others may write to it (its mode is {mode}). Take that from them (chmod go-w), or name another folder"
    return None


def is_own(found: os.stat_result) -> bool:
    """Whether this is a regular file that only this user may write to."""
    if not stat.S_ISREG(found.st_mode):
        return False
    return not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)


def open_own(path: Path) -> BinaryIO | None:
    """Open a file for reading if `is_own`, else return None. Raises OSError, FileNotFoundError if there is none."""
    try:
        number = os.open(path, READING)
    except OSError as error:
        if error.errno in NOT_TO_BE_OPENED:
            return None
        raise
    # what was opened, which may be another file than the name had a moment ago
    if is_own(os.fstat(number)):
        return open(number, "rb")
    os.close(number)
    return None
