"""JSON from strangers: an object in UTF-8, no key twice, no NaN, no endless nesting. Nothing else gets through."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

from registry.artifact.errors import ArtifactRefused

MAX_DEPTH = 32


class _Refused(ValueError):
    """A problem found inside the json module's callbacks; `load_object` gives it its field and code."""


def load_object(data: bytes, *, field: str, code: str = "bad_json") -> dict[str, Any]:
    """Parse one JSON object. Bound the size of `data` before calling: parsing takes up to some 30 times that memory.

    Raises ArtifactRefused with `code`, or with `duplicate_key`.
    """
    try:
        value = _parse(data, field=field)
    except ArtifactRefused:
        raise
    except RecursionError as error:
        raise _refusal("it is nested too deeply", field=field, code=code) from error
    except _Refused as error:
        raise _refusal(str(error), field=field, code=code) from error
    except ValueError as error:
        raise _refusal(_explain(error), field=field, code=code) from error
    return value


def _explain(error: ValueError) -> str:
    """In our words, for Python's change from version to version."""
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON at line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return "it holds half of a surrogate pair"
    return "it holds an integer of thousands of digits"


def _refusal(problem: str, *, field: str, code: str) -> ArtifactRefused:
    return ArtifactRefused(code, problem, field=field, remedy="write it again as plain JSON")


def _parse(data: bytes, *, field: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = sorted(key for key, _ in pairs)
            twice = next(key for key, following in itertools.pairwise(names) if key == following)
            problem = f"the key {twice[:80]!a} stands twice"
            raise ArtifactRefused("duplicate_key", problem, field=field, value=twice, remedy="keep one of the two")
        return found

    text = data.decode("utf-8")
    value = json.loads(text, object_pairs_hook=no_duplicates, parse_float=_finite, parse_constant=_no_constant)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair cannot be written again
    if not isinstance(value, dict):
        raise _Refused("it is not a JSON object")
    if _depth(value) > MAX_DEPTH:
        raise _Refused(f"it is nested deeper than {MAX_DEPTH} levels")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Refused(f"the number {text[:40]} is too large")
    return number


def _no_constant(text: str) -> None:
    raise _Refused(f"{text} is not JSON")


def _depth(value: object) -> int:
    """Levels of nesting, counted without recursion; stops counting past MAX_DEPTH."""
    level: list[object] = [value]
    depth = 0
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
    return depth
