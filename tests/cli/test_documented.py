"""Every `lorary` command in the documents is one that there is, with options that it has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from registry.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    "README.md",
    "registry/README.md",
    "registry/OPERATIONS.md",
    "workers/README.md",
    "gpu_runtime/README.md",
    "migrations/README.md",
)
DOCUMENTS += ("helm/README.md", "helm/RUNBOOK.md", "CHANGELOG.md", "helm/templates/NOTES.txt")
FENCED = re.compile(r"^ *(?:\$\(|[A-Z_]+=\S+ )*lorary ([a-z].*)$", re.MULTILINE)
QUOTED = re.compile(r"`lorary\s([^`]+)`")
CUT = re.compile(r"\s#\s.*|\s(?:&&|\|\|?|>|;)\s.*|\\$|\.\.\.|\)$")


def commands(document: str) -> list[str]:
    text = re.sub(r"\\\n\s*", "", (ROOT / document).read_text())
    blocks = "\n".join(re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)) if document.endswith(".md") else text
    return [*(CUT.sub("", found) for found in FENCED.findall(blocks)), *(" ".join(found.split()) for found in QUOTED.findall(text))]


def alternatives(command: str) -> list[str]:
    """`gc plan|run|status` is three commands."""
    first = re.search(r"\b([a-z-]+(?:\|[a-z-]+)+)", command)
    return [command] if first is None else [command.replace(first[1], one, 1) for one in first[1].split("|")]


def wrong(command: str) -> str | None:
    """What of it there is not. Placeholders of positional arguments are not looked at."""
    here: Any = typer.main.get_command(app)
    words = shlex.split(re.sub(r"[\[\]]", " ", command.replace("'", "")))
    while words and hasattr(here, "commands"):
        word = words.pop(0)
        if word.startswith("-"):
            break
        if word not in here.commands:
            return f"there is no command {word!r} in {here.name!r}"
        here = here.commands[word]
    known = {option for parameter in here.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    unknown = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
    return f"`{here.name}` does not take {unknown}" if unknown else None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_commands_exist(document: str) -> None:
    told = {f"lorary {command}": reason for found in commands(document) for command in alternatives(found) if (reason := wrong(command))}
    assert not told


def test_enough_of_them_is_seen() -> None:
    assert len([found for document in DOCUMENTS for found in commands(document)]) > 80
