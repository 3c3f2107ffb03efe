"""Text that strangers choose and that we store and show."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator


def _storable(text: str) -> str:
    for char in text:
        if char == "\0" or "\ud800" <= char <= "\udfff":
            raise ValueError(f"it holds {char!a}, which can be neither stored nor shown; leave it out")
    return text


Text = Annotated[str, AfterValidator(_storable)]
"""Without NUL (PostgreSQL stores none) and without lone surrogates (UTF-8 has none). Limits of length come on top."""
