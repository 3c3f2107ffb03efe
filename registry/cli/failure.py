"""The one error that the command ends with: a sentence on stderr and exit code 1."""

from __future__ import annotations


class CliFailure(Exception):
    """Something the person at the terminal must hear. `fields` are shown as `name: value` lines under the sentence."""

    def __init__(self, detail: str, *, remedy: str | None = None, **fields: object) -> None:
        super().__init__(detail)
        self.detail = detail
        self.remedy = remedy
        self.fields = {name: str(value) for name, value in fields.items() if value is not None}
