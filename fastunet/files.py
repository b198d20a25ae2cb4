"""Files that are written whole or not at all, and folders that one process writes to."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A new file to write to, which takes the name ``path`` once all is on the disk; after an error nothing is changed.

    A reader, or a crash, never sees half a file. A link of that name is replaced; what it points to stays as it was.

    Raises:
        OSError: of the system.
    """
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}{path.suffix}")
    file = open(temporary, "xb")  # noqa: SIM115 - never a file or a link that somebody put there
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Whether no other process is in here with the same ``folder``, which has to be there.

    The system knows, by a lock that ends with the process however that ends; where there are no locks, it is True.

    Raises:
        OSError: of the system.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _locked.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        except OSError:  # a file system that has none
            alone = True
        yield alone
    finally:
        _locked.discard(descriptor)
        os.close(descriptor)


_locked: set[int] = set()


def _let_go() -> None:
    """A child that outlives its parent for a moment does not hold the parent's locks."""
    while _locked:
        with suppress(OSError):
            os.close(_locked.pop())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)
