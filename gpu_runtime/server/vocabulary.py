"""The bytes of every token: what makes detokenisation exact and `bytes` in logprobs honest.

Two families cover the served models. Byte-level BPE (Llama 3, Qwen, SmolLM) spells bytes as printable characters;
SentencePiece with byte fallback (Llama 2, Mistral, Gemma) spells words with a visible space and rare bytes as <0xNN>.
Any other decoder is refused at start rather than detokenised almost right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable spelling of the 256 bytes: printable ones stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + offset): byte for offset, byte in enumerate(others)}


class Vocabulary:
    """Token id -> bytes, for one tokenizer.json. Immutable; safe to share between threads.

    Raises ValueError where the tokenizer's decoder is of neither family.
    """

    def __init__(self, tokenizer: Mapping[str, Any], tokens: Mapping[str, int]) -> None:
        spell = _speller(tokenizer)
        self._bytes: dict[int, bytes] = {token_id: spell(token) for token, token_id in tokens.items()}
        added = tokenizer.get("added_tokens", [])
        self.special_ids = frozenset(entry["id"] for entry in added if entry.get("special"))
        self.longest_bytes = max((len(value) for value in self._bytes.values()), default=0)

    def __contains__(self, token_id: int) -> bool:
        return token_id in self._bytes

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes; none for an id that the model's padded head has and the tokenizer lacks."""
        return self._bytes.get(token_id, b"")

    def visible_bytes(self, token_id: int) -> bytes:
        """As `bytes_of`, without special tokens: what a reply shows."""
        return b"" if token_id in self.special_ids else self.bytes_of(token_id)


def _speller(tokenizer: Mapping[str, Any]) -> Callable[[str], bytes]:
    decoders = list(_decoders(tokenizer.get("decoder") or {}))
    kinds = {decoder.get("type") for decoder in decoders}
    if "ByteLevel" in kinds:
        return _ByteLevel()
    if "ByteFallback" in kinds:
        return _ByteFallback(decoders)
    raise ValueError(
        f"tokenizer.json has the decoder {sorted(str(kind) for kind in kinds) or 'none'}; it must be ByteLevel or use ByteFallback"
    )


def _decoders(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder.get("type") == "Sequence":
        for inner in decoder["decoders"]:
            yield from _decoders(inner)
    elif decoder:
        yield decoder


class _ByteLevel:
    def __init__(self) -> None:
        self._alphabet = byte_alphabet()

    def __call__(self, token: str) -> bytes:
        # Added tokens may hold characters outside the alphabet; such a token stands for its own text.
        spelled = [self._alphabet.get(character) for character in token]
        return token.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)


class _ByteFallback:
    """A leading space stays: generated text continues a prompt, it does not begin a document."""

    def __init__(self, decoders: list[Mapping[str, Any]]) -> None:
        self._replaced = [
            (decoder["pattern"]["String"], decoder["content"])
            for decoder in decoders
            if decoder["type"] == "Replace" and "String" in decoder["pattern"]
        ]
        self._replaced += [(decoder.get("replacement", "\u2581"), " ") for decoder in decoders if decoder["type"] == "Metaspace"]

    def __call__(self, token: str) -> bytes:
        found = _BYTE_TOKEN.fullmatch(token)
        if found:
            return bytes([int(found[1], 16)])
        for pattern, content in self._replaced:
            token = token.replace(pattern, content)
        return token.encode()
