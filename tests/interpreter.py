"""Triton's interpreter without what it does again and again, so that kernels take a third of the time.

The results are the same. Of a Triton that does these things otherwise nothing is changed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def quicken() -> None:
    """Change the interpreter of the Triton that is installed, once and for all."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # of each sum of integers an overflow is looked for, and then nothing said
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``patch``, which puts the interpreter's functions in the place of the language's for a kernel, until its end, and
    again for each function that the kernel calls, where all are in place."""
    import triton.language as tl

    patched: set[tuple[bool, bool]] = set()
    nothing = SimpleNamespace(restore=lambda: None)

    @functools.cache
    def languages(function: Any) -> tuple[bool, bool]:
        seen = {id(value) for value in function.__globals__.values()}
        return id(tl) in seen, id(tl.core) in seen

    def once(function: Any) -> Any:
        if (here := languages(function)) in patched:
            return nothing
        scope = patch(function)
        undo = scope.restore

        def restore() -> None:
            undo()
            patched.clear()

        scope.restore = restore
        patched.add(here)
        return scope

    return once


def _by_name(dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``dtype_of``, NumPy's dtype of a type or of a block of it, for which each call makes a table anew."""
    found: dict[str, Any] = {}

    def by_name(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in found:
            found[name] = dtype_of(kind)
        return found[name]

    return by_name
