"""A run's folder for weights in files: as open as it must be, and gone with the run."""

import os
import shutil
import socket
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

LOCK = "lock"
YOUNG = 60.0  # seconds in which a folder may not have its lock yet


class ExchangeFolder:
    """A folder in which a trainer leaves weights for servers.

    The run holds a lock in it.  A folder whose lock nobody holds is left over from a run that was
    killed, in shared memory perhaps, and the next run on the same machine removes it.

    Args:
        parent: A folder that trainer and servers both see, and whose permissions this one gets.
            None for the shared memory of one machine, where only servers of the same user can read
            it.
    """

    def __init__(self, parent: str | None) -> None:
        self.parent = parent
        self._made: Path | None = None
        self._remove: Callable[[], object] | None = None

    @property
    def path(self) -> Path:
        """Return the folder, made when it is first used."""
        if self._made is None:
            place = Path(self.parent or memory_folder())
            remove_leftovers(place)
            self._made = Path(tempfile.mkdtemp(prefix=prefix(), dir=place))
            held = open(self._made / LOCK, "w")  # noqa: SIM115 (as long as the run)
            self._remove = weakref.finalize(self, remove, self._made, held)
            with suppress(OSError):  # a file system without locks: nobody removes it then
                lock(held)
            self._made.chmod(self.mode)
        return self._made

    @property
    def mode(self) -> int:
        """Return the permissions of what the servers must read."""
        return Path(self.parent).stat().st_mode & 0o777 if self.parent else 0o700

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Give the path of a file that the servers can read until the block ends."""
        path = self.path / name
        path.touch()
        path.chmod(self.mode & 0o666)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def subfolder(self, name: str) -> Path:
        """Make a folder in this one; `share` it when it is filled."""
        path = self.path / name
        path.mkdir()
        return path

    def share(self, path: Path) -> None:
        """Let the servers read a subfolder."""
        for file in path.iterdir():
            file.chmod(self.mode & 0o666)
        path.chmod(self.mode)

    def close(self) -> None:
        """Remove the folder.  If it is used again, there is another."""
        if self._remove is not None:
            self._remove()
        self._made = self._remove = None


def memory_folder() -> str:
    """Return the folder of shared memory, else the machine's folder for temporary files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def prefix() -> str:
    """Return how the names of this machine's folders begin: locks are sure on one machine only."""
    return f"gmpo-weights-{socket.gethostname()}-"


def remove_leftovers(place: Path) -> None:
    """Remove folders of runs of this user on this machine that have ended."""
    for path in place.glob(f"{prefix()}*"):
        with suppress(OSError):
            status = path.stat()
            young = time.time() - status.st_mtime < YOUNG
            if status.st_uid == os.getuid() and not young and not is_held(path):
                shutil.rmtree(path, ignore_errors=True)


def is_held(path: Path) -> bool:
    """Return whether a run that lives holds the lock of a folder."""
    with open(path / LOCK, "a") as file:
        try:
            lock(file)
        except OSError:
            return True
        return False


def lock(file: TextIO) -> None:
    """Take the lock, which ends with the process.

    Raises:
        OSError: Another process holds it.
    """
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove(path: Path, held: TextIO) -> None:
    shutil.rmtree(path, ignore_errors=True)
    held.close()
