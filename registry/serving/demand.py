"""How many tokens a request may use, before anybody has counted them: what is reserved for it.

Only a replica has the tokenizer. The prompt is taken at four bytes of text a token, which the settlement corrects either
way; the completion at its upper limit, where the request states one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BYTES_A_TOKEN = 4
OPEN_END = 1024
"""Completion tokens reserved for a chat that states no limit; it may use more, and is settled by what it used."""
DEFAULT_COMPLETION = 16
"""OpenAI's default of `max_tokens` for completions, and ours."""


def tokens_wanted(asked: Mapping[str, Any], *, limit: int | None) -> int:
    """Prompt and completions together. A request that states no limit of its own takes at most the tenant's `limit`."""
    prompt = asked["prompt"] if "prompt" in asked else asked.get("messages")
    stated = _stated(asked)
    each = stated if stated is not None else DEFAULT_COMPLETION if "prompt" in asked else OPEN_END
    wanted = _prompt_tokens(prompt) + _num_prompts(prompt) * _num_choices(asked) * each
    return wanted if stated is not None or limit is None else min(wanted, limit)


def _stated(asked: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        value = asked.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return max(0, min(value, 2**31))
    return None


def _num_choices(asked: Mapping[str, Any]) -> int:
    """Of each prompt: all that are generated, not only the best of them."""
    stated = (asked.get(name) for name in ("n", "best_of"))
    return max([1, *(min(value, 128) for value in stated if isinstance(value, int))])


def _num_prompts(prompt: Any) -> int:
    """A list of texts or of lists of ids is so many prompts; a list of ids is one, and so are messages."""
    many = isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt)
    return len(prompt) if many else 1


def _prompt_tokens(prompt: Any) -> int:
    """Numbers are ids; of everything else the text counts, however it is nested."""
    num_ids, num_bytes, waiting = 0, 0, [prompt]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            num_bytes += len(part.encode("utf-8", "surrogatepass"))
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, int):
            num_ids += 1
    return num_ids + -(-num_bytes // BYTES_A_TOKEN)
