"""Between characters and token ids, for one base model: its tokenizer and its chat template.

Read from the model directory (tokenizer.json, tokenizer_config.json, chat_template.jinja, config.json); nothing here
knows HTTP or the engine, which reads for itself which tokens end a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gpu_runtime.server.chat_template import ChatTemplate, ChatTemplateError
from gpu_runtime.server.detokenize import Detokenizer
from gpu_runtime.server.vocabulary import Vocabulary


class Text:
    """Safe to share between threads: encoding may run off the event loop.

    Raises ValueError naming the file where the directory lacks or has malformed tokenizer files.
    """

    def __init__(self, model_dir: Path) -> None:
        self._tokenizer = _load_tokenizer(model_dir / "tokenizer.json")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = _read_json(model_dir / "config.json")
        tokenizer_config = _read_json(model_dir / "tokenizer_config.json")
        special_tokens = _special_tokens(tokenizer_config)
        self.vocabulary = Vocabulary(json.loads(self._tokenizer.to_str()), self._tokenizer.get_vocab(with_added_tokens=True))
        self.num_tokens = int(_text_config(config).get("vocab_size") or self._tokenizer.get_vocab_size())
        source = _template_source(model_dir, tokenizer_config)
        self._template = None if source is None else ChatTemplate(source, special_tokens=special_tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt. Special tokens written in the text become themselves, as in every other server."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of a conversation, up to where the assistant speaks. Raises ChatTemplateError."""
        if self._template is None:
            raise ChatTemplateError("this base model has no chat template; use /v1/completions")
        return self._template.render(messages)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation. The template writes the special tokens, so the tokenizer adds none."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """All the text of a finished sequence, special tokens left out."""
        return b"".join(map(self.vocabulary.visible_bytes, token_ids)).decode("utf-8", errors="replace")

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self.vocabulary)


def _load_tokenizer(path: Path) -> Tokenizer:
    if not _read_json(path).get("model"):
        raise ValueError(f"{path} is missing or names no model; a base model needs its tokenizer.json")
    return Tokenizer.from_str(path.read_text(encoding="utf-8"))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; it must be a JSON object")
    return value


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Multimodal checkpoints nest the language model's part."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ...: strings, or objects that hold one as `content`."""
    named = {name: value for name, value in tokenizer_config.items() if name.endswith("_token")}
    spelled = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: value for name, value in spelled.items() if isinstance(value, str)}


def _template_source(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    path = model_dir / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    value = tokenizer_config.get("chat_template")
    if isinstance(value, list):  # named templates; tools and retrieval have their own, which nothing here uses
        value = {entry["name"]: entry["template"] for entry in value}.get("default")
    return value if isinstance(value, str) else None
