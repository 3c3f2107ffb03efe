"""Text that strangers choose and that we store and show."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

NAME_PATTERN = "^[a-z0-9][a-z0-9._-]{0,62}$"


def _storable(text: str) -> str:
    for char in text:
        if char == "\0" or "\ud800" <= char <= "\udfff":
            raise ValueError(f"it holds {char!a}, which can be neither stored nor shown; leave it out")
    return text


Text = Annotated[str, AfterValidator(_storable)]
"""Without NUL (PostgreSQL stores none) and without lone surrogates (UTF-8 has none). Limits of length come on top."""


@dataclass(frozen=True)
class Spelled:
    """Marks a string that must match `pattern`. Whoever sends another reads `rule`; only the schema shows the expression."""

    pattern: str
    rule: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "pattern": self.pattern}

    def _check(self, text: str) -> str:
        if re.fullmatch(self.pattern, text) is None:
            raise ValueError(self.rule)
        return text


_NAME_RULE = "a name has 1 to 63 lower-case letters, digits, '.', '_' or '-', and begins with a letter or digit"
Name = Annotated[str, Spelled(NAME_PATTERN, _NAME_RULE)]
