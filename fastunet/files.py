"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
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
