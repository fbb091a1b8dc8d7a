"""Files: opened only if they are files, and written so that a crash leaves them whole."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.minivit-tmp")  # the names that `replacing` makes, and nobody else


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, or a link to one, for reading bytes.

    Raises OSError (EINVAL) for a pipe, a socket or a device, which might be waited on for ever or have no end, and
    whatever ``open`` raises.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe's open() would wait
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return open(descriptor, "rb")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that takes the place of ``path`` at the end of the block, or leaves no trace if that fails.

    It is written beside its place, synced to the disk, and renamed (Pillai et al. 2014, "All file systems are not
    created equal", section 4). Meanwhile it has a name that no other file can have, and is created: what lies in the
    folder, a link among it, is never written through. Raises OSError, with ``path``, if it cannot be written, and
    before anything is written if a folder or a device is there.
    """
    check_place(path)
    # cut, because a name has 255 bytes at most
    name = os.fsdecode(os.fsencode(path.name)[:200])
    temporary = path.with_name(f".{name}.{os.urandom(8).hex()}.minivit-tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(temporary, flags, 0o666)  # less the umask, as for any new file
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    try:
        with open(descriptor, "w+b") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C, too, must leave no half file behind
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, os.fspath(temporary)):
            # a full disk names no file
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    sync(path.parent)  # makes the rename last


def check_place(path: Path) -> None:
    """Raise OSError if what is at ``path`` is no file whose place another file may take.

    The administrator's rename would put a file in the place of /dev/null, or of the link /dev/stdout, for everybody.
    """
    if not path.name or path.is_dir():
        raise OSError(errno.EISDIR, "is a folder", os.fspath(path))
    device = os.path.exists(path) and not os.path.isfile(path)
    if device or os.path.realpath(path.parent) == "/dev":
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def user_cache() -> Path:
    """Return minivit's folder in the user's cache (XDG_CACHE_HOME, ~/.cache): for what can be had again.

    An XDG_CACHE_HOME that is relative does not count, as the XDG Base Directory Specification says: it would be another
    cache in each folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given if os.path.isabs(given) else os.path.expanduser("~/.cache")) / "minivit"


def write_text(path: Path, text: str) -> None:
    """Write a file of text, in UTF-8, as :func:`replacing` does."""
    with replacing(path) as f:
        f.write(text.encode())


def unfinished(folder: Path) -> list[Path]:
    """Return the files in ``folder``, not below it, that :func:`replacing` was writing when its process was killed.

    Only whoever keeps others from writing there knows that no process is writing them still.
    """
    try:
        with os.scandir(folder) as entries:
            found = [e.path for e in entries if _TEMPORARY.fullmatch(e.name) and e.is_file(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Path(path) for path in sorted(found)]


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt":  # where neither can be asked for with what may only be read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)
