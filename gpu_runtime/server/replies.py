"""What clients are told: OpenAI's reply objects, whole and in chunks, and logprobs in both of their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpu_runtime.core import TokenLogprob
from gpu_runtime.server.detokenize import Detokenizer
from gpu_runtime.server.vocabulary import Vocabulary

LOWEST_LOGPROB = -9999.0  # what OpenAI sends for "never": JSON has no infinity


@dataclass(frozen=True)
class TokenEntry:
    """One shown token: its logprob, and where its text starts in the choice's text."""

    logprob: TokenLogprob
    offset: int


@dataclass(frozen=True)
class Piece:
    """What one token adds to one choice; the last piece of a choice carries `finish_reason`, the first the prompt's logprobs."""

    index: int
    text: str
    entries: tuple[TokenEntry, ...] = ()
    finish_reason: str | None = None
    prompt: tuple[TokenLogprob, ...] | None = None  # of each token of the prompt but the first


@dataclass(frozen=True)
class Usage:
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0  # of the prompt's, those that did not have to be computed

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


@dataclass(frozen=True)
class ChatShape:
    """Objects of /v1/chat/completions."""

    reply_id: str
    model: str
    created: int
    vocabulary: Vocabulary
    num_logprobs: int | None
    num_prompt_logprobs: int | None = None

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The reply of a request that does not stream; each choice is one piece with all its text."""
        told = self._envelope("chat.completion", [self._choice(piece) for piece in choices]) | {"usage": usage.as_json()}
        return told | prompt_logprobs(choices[0], self.num_prompt_logprobs, self.vocabulary)

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice: who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        text = [self._chunk(piece.index, {"content": piece.text}, self._logprobs(piece), None)] if piece.text or piece.entries else []
        end = [self._chunk(piece.index, {}, None, piece.finish_reason)] if piece.finish_reason else []
        return text + end

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk", []) | {"usage": usage.as_json()}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.reply_id}", "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.index, "message": message, "logprobs": self._logprobs(piece), "finish_reason": piece.finish_reason}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._envelope("chat.completion.chunk", [choice])

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self.num_logprobs is None:
            return None
        return {"content": [self._entry(entry.logprob) for entry in piece.entries], "refusal": None}

    def _entry(self, logprob: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token_id, value) for token_id, value in logprob.top]
        return self._token(logprob.token_id, logprob.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self.vocabulary.bytes_of(token_id)
        return {"token": raw.decode("utf-8", errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


@dataclass(frozen=True)
class CompletionShape:
    """Objects of /v1/completions. `echoes` are prompt texts to put before the choices' text, one a choice, or none.

    An echo with logprobs tells those of the prompt too, so it waits for the choice's first piece.
    """

    reply_id: str
    model: str
    created: int
    vocabulary: Vocabulary
    num_logprobs: int | None
    num_prompt_logprobs: int | None = None
    echoes: tuple[str, ...] = ()
    prompts: tuple[tuple[int, ...], ...] = ()  # of each choice

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        spoken = [self._whole_choice(piece) for piece in choices]
        return self._envelope(spoken) | {"usage": usage.as_json()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The echo, which is all that precedes a completion."""
        if not self.echoes or self.num_logprobs is not None:
            return None
        return self._envelope([self._choice(Piece(index, ""), text=self._echo(index))])

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        echoes = self.echoes and self.num_logprobs is not None and piece.prompt is not None
        echo = [self._envelope([self._choice(Piece(piece.index, "", prompt=piece.prompt), text=self._echo(piece.index))])] if echoes else []
        piece = replace(piece, prompt=None)
        told = piece.text or piece.entries or piece.finish_reason
        return echo + ([self._envelope([self._choice(piece, text=piece.text)])] if told else [])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._envelope([]) | {"usage": usage.as_json()}

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": f"cmpl-{self.reply_id}", "object": "text_completion", "created": self.created, "model": self.model}
        return head | {"choices": choices}

    def _echo(self, index: int) -> str:
        return self.echoes[index] if self.echoes else ""

    def _whole_choice(self, piece: Piece) -> dict[str, Any]:
        told = self._choice(piece, text=self._echo(piece.index) + piece.text)
        return told | prompt_logprobs(piece, self.num_prompt_logprobs, self.vocabulary)

    def _choice(self, piece: Piece, *, text: str) -> dict[str, Any]:
        return {"index": piece.index, "text": text, "logprobs": self._logprobs(piece), "finish_reason": piece.finish_reason}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self.num_logprobs is None:
            return None
        echoed = self._echoed(piece) if self.echoes and piece.prompt is not None else []
        skipped = len(self._echo(piece.index))
        told = [*echoed, *((entry.logprob.token_id, entry.logprob, skipped + entry.offset) for entry in piece.entries)]
        return {
            "tokens": [self._spell(token_id) for token_id, _, _ in told],
            "token_logprobs": [None if one is None else _finite(one.logprob) for _, one, _ in told],
            "top_logprobs": [None if one is None else self._top(one) for _, one, _ in told],
            "text_offset": [offset for _, _, offset in told],
        }

    def _echoed(self, piece: Piece) -> list[tuple[int, TokenLogprob | None, int]]:
        """Token, logprob and offset of each token of the prompt; nothing precedes the first, so it has no logprob."""
        ids, decoder, offset, told = self.prompts[piece.index], Detokenizer(self.vocabulary), 0, []
        for token_id, logprob in zip(ids, (None, *(piece.prompt or ())), strict=True):
            text = decoder.push(token_id)
            own = min(len(text), decoder.num_characters(token_id))  # as in ChoiceText
            offset += len(text)
            told.append((token_id, logprob, offset - own))
        return told

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """The likeliest ones and always the chosen one, as OpenAI does."""
        pairs = (*logprob.top[: self.num_logprobs], (logprob.token_id, logprob.logprob))
        return {self._spell(token_id): _finite(value) for token_id, value in pairs}

    def _spell(self, token_id: int) -> str:
        """Tokens that are no whole characters are spelled as `bytes:\\xNN`: as replacement characters two would share a key."""
        raw = self.vocabulary.bytes_of(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


Shape = ChatShape | CompletionShape


def prompt_logprobs(piece: Piece, num_top: int | None, vocabulary: Vocabulary) -> dict[str, Any]:
    """vLLM's field: null for the first token, then {token id: logprob, rank, text} of the token and the likeliest ones."""
    if num_top is None or piece.prompt is None:
        return {}
    return {"prompt_logprobs": [None, *(_ranked(one, num_top, vocabulary) for one in piece.prompt)]}


def _ranked(one: TokenLogprob, num_top: int, vocabulary: Vocabulary) -> dict[str, Any]:
    pairs = [(token_id, value, rank) for rank, (token_id, value) in enumerate(one.top[:num_top], start=1)]
    own = (one.token_id, one.logprob, one.rank)
    return {
        str(token_id): {
            "logprob": _finite(value),
            "rank": rank,
            "decoded_token": vocabulary.bytes_of(token_id).decode("utf-8", errors="replace"),
        }
        for token_id, value, rank in (own, *(pair for pair in pairs if pair[0] != one.token_id))
    }


def best_of(choices: Sequence[Piece], *, candidates: int, keep: int) -> list[Piece]:
    """Of each run of `candidates` choices the `keep` likeliest by mean logprob of their tokens, best first, numbered anew."""
    if candidates == keep:
        return list(choices)
    runs = [choices[start : start + candidates] for start in range(0, len(choices), candidates)]
    kept = [piece for run in runs for piece in sorted(run, key=_mean_logprob, reverse=True)[:keep]]
    return [replace(piece, index=index) for index, piece in enumerate(kept)]


def _mean_logprob(piece: Piece) -> float:
    """Of the tokens that are shown; a choice that shows none is the least likely."""
    values = [_finite(entry.logprob.logprob) for entry in piece.entries]
    return sum(values) / len(values) if values else LOWEST_LOGPROB


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
