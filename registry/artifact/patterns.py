"""Regular expressions from strangers, matched in bounded time.

adapter_config.json carries expressions in `target_modules`, `rank_pattern` and `alpha_pattern`. Python's own matcher
backtracks and has no timeout, so `(a+)+b` would hold a server for ever. Here the expression is parsed by Python (same
syntax, same meaning) and matched by following the *set* of positions that each piece can reach: polynomial, and every
step is paid from a budget. Back references, atomic groups and inline flags are refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Set
from typing import Any

from registry.artifact.errors import ArtifactRefused, printable

MAX_PATTERN = 2048
DEFAULT_BUDGET = 2_000_000  # set elements visited, a second or two of Python; a real expression over 560 modules takes 0.2 M

_parser: Any = importlib.import_module("re._parser")
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_ONE_CHARACTER = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN"})
_STEPS = frozenset({"SUBPATTERN", "BRANCH", "MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT", "AT"})
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdigit,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
}


class PatternSet:
    """The expressions of one config, each parsed once, all paying from one budget."""

    def __init__(self, *, budget: int = DEFAULT_BUDGET) -> None:
        self._left = budget
        self._parsed: dict[str, list[Any]] = {}

    def full_match(self, pattern: str, text: str, *, field: str) -> bool:
        """`re.fullmatch(pattern, text) is not None`, for text without newlines. Raises ArtifactRefused."""
        return self._matches(pattern, pattern, text, field=field)

    def suffix_match(self, pattern: str, text: str, *, field: str) -> bool:
        """PEFT's rule for rank_pattern and alpha_pattern: `(.*\\.)?(pattern)$` from the first character on."""
        if _PLAIN.fullmatch(pattern):
            self._pay(1, pattern, field=field)
            return _plain_suffix(pattern, text)
        return self._matches(rf"(.*\.)?({pattern})$", pattern, text, field=field)

    def _matches(self, expression: str, shown: str, text: str, *, field: str) -> bool:
        items = self._parse(expression, shown, field=field)

        def pay(cost: int) -> None:
            self._pay(cost, shown, field=field)

        try:
            return len(text) in _Walk(text, pay).ends(items, frozenset({0}))
        except _Unsupported as error:
            raise _bad_pattern(f"{printable(shown)[:80]} uses {error}", shown, field=field) from error
        except RecursionError as error:
            raise _bad_pattern(f"{printable(shown)[:80]} is nested too deeply", shown, field=field) from error

    def _parse(self, expression: str, shown: str, *, field: str) -> list[Any]:
        if expression in self._parsed:
            return self._parsed[expression]
        if len(expression) > MAX_PATTERN:
            raise _bad_pattern(f"an expression of {len(expression)} characters, at most {MAX_PATTERN} are read", shown, field=field)
        self._pay(10 * len(expression), shown, field=field)
        try:
            parsed = _parser.parse(expression)
        except RecursionError as error:
            raise _bad_pattern(f"{printable(shown)[:80]} is nested too deeply", shown, field=field) from error
        except (re.error, OverflowError, FutureWarning) as error:
            raise _bad_pattern(f"{printable(shown)[:80]} is not a regular expression", shown, field=field) from error
        if parsed.state.flags & ~re.UNICODE:
            raise _bad_pattern(f"{printable(shown)[:80]} sets flags", shown, field=field)
        self._parsed[expression] = list(parsed)
        return self._parsed[expression]

    def _pay(self, cost: int, shown: str, *, field: str) -> None:
        self._left -= cost
        if self._left < 0:
            raise ArtifactRefused(
                "pattern_too_complex",
                f"{printable(shown)[:80]} takes too long to match",
                field=field,
                value=shown,
                remedy="list the modules by name instead",
            )


def _bad_pattern(problem: str, shown: str, *, field: str) -> ArtifactRefused:
    remedy = "use a plain expression: literals, classes, groups, '|', repeats, anchors, lookaround"
    return ArtifactRefused("bad_pattern", problem, field=field, value=shown, remedy=remedy)


def _plain_suffix(pattern: str, text: str) -> bool:
    """`suffix_match` for an expression of letters, digits, '_' and '.' (any character): most configs have no other."""
    start = len(text) - len(pattern)
    if start < 0 or (start and text[start - 1] != "."):
        return False
    return all(want in (".", have) for want, have in zip(pattern, text[start:], strict=True))


class _Unsupported(ValueError):
    """A construct whose meaning depends on the path that a matcher took."""


class _Walk:
    """Where a match of a parsed expression can end, for every place where it can begin, in one text."""

    def __init__(self, text: str, pay: Callable[[int], None]) -> None:
        self._text = text
        self._pay = pay

    def ends(self, items: Iterable[Any], starts: Set[int]) -> Set[int]:
        for op, argument in items:
            if not starts:
                return starts
            self._pay(len(starts))
            if op.name in _ONE_CHARACTER:
                starts = self._one_character(op.name, argument, starts)
            elif op.name in _STEPS:
                starts = getattr(self, f"_{op.name.lower()}")(argument, starts)
            else:
                raise _Unsupported(op.name.lower().replace("_", " "))
        return starts

    def _one_character(self, name: str, argument: Any, starts: Set[int]) -> Set[int]:
        text, end = self._text, len(self._text)
        if name == "IN":
            self._pay(len(starts) * len(argument))
        return {at + 1 for at in starts if at < end and _character_matches(name, argument, text[at])}

    def _subpattern(self, argument: Any, starts: Set[int]) -> Set[int]:
        _group, add_flags, del_flags, items = argument
        if add_flags or del_flags:
            raise _Unsupported("inline flags")
        return self.ends(items, starts)

    def _branch(self, argument: Any, starts: Set[int]) -> Set[int]:
        self._pay(len(starts) * len(argument[1]))
        return set().union(*(self.ends(items, starts) for items in argument[1]))

    def _max_repeat(self, argument: Any, starts: Set[int]) -> Set[int]:
        low, high, items = int(argument[0]), int(argument[1]), argument[2]
        reached: set[int] = set()
        front, count = starts, 0
        while front and count <= high:
            if count >= low:
                reached |= front
            self._pay(1)
            following = self.ends(items, front)
            if following == front and count < low:
                count = low - 1  # every further round reaches the same places
            front = following - reached if count >= low else following
            count += 1
        return reached

    _min_repeat = _max_repeat  # lazy or greedy: the same places are reached

    def _assert(self, argument: Any, starts: Set[int]) -> Set[int]:
        return {at for at in starts if self._looks(argument, at)}

    def _assert_not(self, argument: Any, starts: Set[int]) -> Set[int]:
        return {at for at in starts if not self._looks(argument, at)}

    def _looks(self, argument: Any, at: int) -> bool:
        direction, items = argument
        if direction >= 0:
            return bool(self.ends(items, {at}))
        width = items.getwidth()[1]  # Python takes fixed widths only
        return at >= width and at in self.ends(items, {at - width})

    def _at(self, argument: Any, starts: Set[int]) -> Set[int]:
        name = argument.name
        if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return {0} & starts
        if name in ("AT_END", "AT_END_STRING"):
            return {len(self._text)} & starts
        if name not in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
            raise _Unsupported(name)
        return {at for at in starts if self._at_boundary(at) == (name == "AT_BOUNDARY")}

    def _at_boundary(self, at: int) -> bool:
        word = _CATEGORIES["CATEGORY_WORD"]
        before = at > 0 and word(self._text[at - 1])
        after = at < len(self._text) and word(self._text[at])
        return before != after


def _character_matches(name: str, argument: Any, char: str) -> bool:
    if name == "ANY":
        return True
    if name == "IN":
        negated = argument[0][0].name == "NEGATE"
        return any(_class_has(op.name, value, char) for op, value in argument[negated:]) is not negated
    return (ord(char) == int(argument)) is (name == "LITERAL")


def _class_has(name: str, value: Any, char: str) -> bool:
    if name == "LITERAL":
        return ord(char) == int(value)
    if name == "RANGE":
        return int(value[0]) <= ord(char) <= int(value[1])
    assert name == "CATEGORY", f"unknown member {name} of a character class"
    category = str(value.name).replace("NOT_", "")
    return _CATEGORIES[category](char) is (category == value.name)
