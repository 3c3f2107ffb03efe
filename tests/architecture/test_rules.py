"""The rules of DESIGN 7 that a linter cannot hold, read from the syntax tree. A rule that nothing checks leaks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOUSES = ("registry", "workers", "gpu_runtime")
SOURCES = sorted(path for house in HOUSES for path in (ROOT / house).rglob("*.py"))
DOMAINS = ("tenants", "audit", "secrets", "webhooks", "jobs", "blobs", "uploads", "base_models", "adapters", "serving", "hub", "gc")
FIVE_FILES = ("models.py", "schemas.py", "repository.py", "service.py", "endpoints.py")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120

# The three loop edges, where an unknown error must not end the process: the job shell, the step loop, the agent.
BROAD_EXCEPT_ALLOWED = {"workers/shell.py", "gpu_runtime/engine/loop.py", "gpu_runtime/server/agent.py"}
ENVIRONMENT_ALLOWED = {"registry/config.py", "gpu_runtime/config.py"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
FORBIDDEN_WORDS = re.compile(r"\b(lora_id|lora_name|lora_int_id|backbone|codebook)\b")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(), filename=str(path)))


def calls_of(path: Path, attribute: str) -> list[int]:
    return [
        node.lineno
        for node in nodes(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == attribute
    ]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_file_and_function_lengths(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES, f"{relative(path)} is past {MAX_FILE_LINES} lines: split it"
    limit = MAX_KERNEL_LINES if "kernels" in path.parts else MAX_FUNCTION_LINES
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= limit, f"{relative(path)}:{node.lineno} {node.name} has {length} lines, at most {limit}"


def test_functions_are_short_on_the_whole() -> None:
    lengths = sorted(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path in SOURCES
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[int(len(lengths) * 0.9)] <= 30


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_module_says_what_it_owns(path: Path) -> None:
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{relative(path)} has no module docstring"


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_has_the_same_five_files(domain: str) -> None:
    missing = [name for name in FIVE_FILES if not (ROOT / "registry" / domain / name).exists()]
    assert not missing, f"registry/{domain} lacks {missing}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_broad_except_only_at_loop_edges(path: Path) -> None:
    if relative(path) in BROAD_EXCEPT_ALLOWED:
        return
    for node in nodes(path):
        if isinstance(node, ast.ExceptHandler):
            caught = "BaseException" if node.type is None else ast.unparse(node.type)
            assert caught not in {"Exception", "BaseException"}, f"{relative(path)}:{node.lineno} catches {caught}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_environment_is_read_in_the_two_config_files(path: Path) -> None:
    if relative(path) in ENVIRONMENT_ALLOWED:
        return
    reads = [
        node.lineno
        for node in nodes(path)
        if (
            isinstance(node, ast.Attribute)
            and node.attr in {"environ", "getenv"}
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        )
    ]
    assert not reads, f"{relative(path)} reads the environment on lines {reads}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name in {"service.py", "repository.py", "endpoints.py"}], ids=relative)
def test_nobody_commits_inside_a_service(path: Path) -> None:
    for verb in ("commit", "rollback"):
        assert not calls_of(path, verb), f"{relative(path)} calls {verb}: the unit of work does that"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_names_say_something(path: Path) -> None:
    assert path.stem not in VAGUE_NAMES, f"{relative(path)}: name it after what it owns"
    found = FORBIDDEN_WORDS.findall(path.read_text())
    assert not found, f"{relative(path)} says {set(found)}; DESIGN 2 has the word"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_stubs(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), f"{relative(path)} leaves work undone"
    raised = [
        node.lineno
        for node in nodes(path)
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc)
    ]
    assert not raised, f"{relative(path)} raises NotImplementedError on lines {raised}"


@pytest.mark.parametrize("path", [path for path in SOURCES if "registry/artifact" not in relative(path)], ids=relative)
def test_lora_alpha_is_known_to_the_artifact_leaf_alone(path: Path) -> None:
    names = {node.id for node in nodes(path) if isinstance(node, ast.Name)} | {
        node.attr for node in nodes(path) if isinstance(node, ast.Attribute)
    }
    assert "lora_alpha" not in names, f"{relative(path)}: say rank and scale (DESIGN 2)"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("[a-z]*/README.md")), ids=relative)
def test_documents_are_finished_and_their_paths_exist(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"PLACEHOLDER|TODO|FIXME", text), f"{relative(path)} leaves work undone"
    for named in re.findall(r"`((?:registry|workers|gpu_runtime|migrations|tests)/[\w/.]+\.(?:py|md))`", text):
        assert (ROOT / named).exists(), f"{relative(path)} names {named}, which is not there"
