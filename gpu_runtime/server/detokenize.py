"""Tokens to text as they come: never half a character, never a piece of a stop string.

Detokenizer   token ids -> text, equal at the end to decoding all bytes at once
StopScanner   text -> text up to the first stop string, whatever the borders between pieces
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gpu_runtime.server.vocabulary import Vocabulary


class Detokenizer:
    """One sequence's running UTF-8 decoder. Bytes that can never become a character turn into U+FFFD."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        return self._decoder.decode(self._vocabulary.visible_bytes(token_id))

    def num_characters(self, token_id: int) -> int:
        """How many whole characters the token has by itself."""
        return len(self._vocabulary.visible_bytes(token_id).decode("utf-8", errors="ignore"))

    def finish(self) -> str:
        """What an unfinished last character decodes to."""
        return self._decoder.decode(b"", final=True)


class StopScanner:
    """Cuts text at the stop string that is completed first; of those completed together, at the one that starts first.

    Text that may still turn out to be the beginning of a stop string is held back. `include`: the stop string is shown too.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is now safe to show. After `stopped`, nothing more is."""
        if self.stopped:
            return ""
        pending = self._held + text
        found = self._first_stop(pending)
        if found is not None:
            self.stopped, self._held = True, ""
            return pending[: found[0] if self._include else found[1]]
        keep = self._num_held(pending)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def finish(self) -> str:
        """The held text, once nothing can complete a stop string any more."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> tuple[int, int] | None:
        """(end, start)"""
        return min(((start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0), default=None)

    def _num_held(self, text: str) -> int:
        longest = min(len(text), self._longest - 1)
        return next((size for size in range(longest, 0, -1) if self._begins_stop(text[len(text) - size :])), 0)

    def _begins_stop(self, suffix: str) -> bool:
        return any(stop.startswith(suffix) for stop in self._stops)
