"""Triton's interpreter without what it does again and again, which is a third of its time here.

The results are the same. Of a Triton that does these things otherwise nothing is changed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any


def quicken() -> None:
    """Change the interpreter of the Triton that is installed, once and for all."""
    from triton.runtime import interpreter

    patch, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if patch is not None and hasattr(scope, "restore"):
        interpreter._patch_lang = _once(patch, scope)
    if (dtype_of := getattr(interpreter, "_get_np_dtype", None)) is not None:
        interpreter._get_np_dtype = _by_name(dtype_of)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # of each sum of integers an overflow is looked for, and then nothing said
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _once(patch: Callable[..., Any], scope: type) -> Callable[..., Any]:
    """``patch``, which replaces the language by the interpreter's and is called for a kernel and for each call of a
    function in it, where it finds all replaced: there it need not look. A kernel's end undoes it."""
    import triton.language as tl

    patched: set[frozenset[int]] = set()

    @functools.cache
    def languages(function: Any) -> frozenset[int]:
        known = (tl, tl.core)
        return frozenset(id(t) for t in function.__globals__.values() if inspect.ismodule(t) and t in known)

    class Undone(scope):  # type: ignore[misc]
        def restore(self) -> None:
            super().restore()
            patched.clear()

    def once(function: Any) -> Any:
        found = Undone()
        if (here := languages(function)) not in patched:
            found._changes = patch(function)._changes
            patched.add(here)
        return found

    return once


def _by_name(dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``dtype_of``, NumPy's dtype of a type or of a block of it, of which each call makes a table anew."""
    found: dict[str, Any] = {}

    def by_name(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in found:
            found[name] = dtype_of(kind)
        return found[name]

    return by_name
