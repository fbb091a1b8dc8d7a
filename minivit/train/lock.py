"""One process for a run's folder: two that trained into the same one would mix their records and checkpoints."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from types import TracebackType

from minivit.errors import CheckpointError, ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
"""The file in the run's folder that is locked; it holds the owner's process number and is gone after the run."""


class RunLock:
    """Holds a run's folder for this process: ``with RunLock(folder): …``; nothing is locked if ``folder`` is None.

    The same lock may be entered again within its block. What a run's folder says is to be read within it: before, it
    may still change.

    The system lets go of the lock (flock) when the process ends, however it ends, so that a killed run can be resumed
    at once. Where Python has no flock, the file itself is the lock, and after a kill it has to be removed by hand. A
    file system that knows no locks goes without.

    Raises ConfigError, naming the owner, if the folder is held by another process or by another RunLock of this one;
    CheckpointError if nothing can be written there, or a file of that name is none of minivit's. The folder is made if
    it is missing.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.path = None if folder is None else Path(folder) / NAME
        self._descriptor, self._depth = -1, 0

    def __enter__(self) -> RunLock:
        if self.path is not None and self._depth == 0:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = _locked(self.path)
                os.ftruncate(self._descriptor, 0)
                os.write(self._descriptor, str(os.getpid()).encode())
            except BlockingIOError as error:
                remedy = "wait for its end, stop it, or name another folder"
                by_hand = "" if fcntl else f"; if there is no such process any more, remove {self.path}"
                raise ConfigError(f"{self.path.parent} is in use by {_owner(self.path)}", remedy + by_hand) from error
            except OSError as error:
                self._release()  # it may be held, but not signed: the disk is full
                what = f"cannot lock {self.path.parent}: {error.strerror or error}"
                raise CheckpointError(what, "make room, mend the folder, or name another") from error
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._release()

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if self.path is not None and descriptor >= 0:
            if fcntl is None:
                os.close(descriptor)  # first, because Windows removes no open file
            with contextlib.suppress(OSError):  # left behind it is harmless
                self.path.unlink(missing_ok=True)
            if fcntl is not None:
                os.close(descriptor)  # last: as long as the file has its name, it is locked


def _locked(path: Path) -> int:
    """Return the descriptor of the lock's file, locked. Raises BlockingIOError if it is held.

    Another OSError says that nothing can be written, or that the file is a link, or holds what no lock holds.
    """
    if fcntl is None:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
                os.close(descriptor)
                raise
        if _is_at(descriptor, path):
            if os.pread(descriptor, 20, 0).strip(b"0123456789"):  # more than the number that a killed owner has left
                os.close(descriptor)
                raise OSError(errno.EEXIST, f"{path} is not a lock of minivit's")
            return descriptor
        os.close(descriptor)  # its last owner has removed it since it was opened


def _is_at(descriptor: int, path: Path) -> bool:
    """Tell whether an open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        return f"process {int(path.read_text('ascii'))}"
    except (OSError, ValueError):  # gone by now, or not yet signed
        return "another process"
