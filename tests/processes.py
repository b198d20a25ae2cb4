"""Python in a process of its own, whose kernels are compiled and not the interpreter's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(*command: str, limit: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python *command`` in the checkout, with nobody at the keyboard; ``environment`` has the last word."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=limit,
    )
