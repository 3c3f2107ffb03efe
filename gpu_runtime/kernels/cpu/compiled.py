"""Owns how the CPU kernels are compiled and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit


def _source_digest() -> str:
    """Of every file in this folder: numba's cache looks at the caller's file alone and would keep stale callees."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


_DIGEST = _source_digest()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile without the GIL, cached on disk (numba's NUMBA_CACHE_DIR decides where) under a name that follows the sources."""
    function.__qualname__ = f"{function.__qualname__}-{_DIGEST}"
    try:
        return njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)(function)
    except RuntimeError:  # numba finds no folder that it may write: every process compiles for itself
        return inlined(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Compile as a part of its callers only: their cache entries hold it."""
    return njit(nogil=True, error_model="numpy", boundscheck=False)(function)
