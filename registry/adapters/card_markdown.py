"""A card as Markdown with YAML front matter, in the Hub's manner.

Tenants choose names, tags, descriptions; upstream publishers choose names too. None of them may become markup, YAML or a
line of the table of facts: in YAML they are quoted, in Markdown escaped, and the tenant's own README is shown as text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator

from registry.adapters.schemas import CardOut
from registry.signing.schemas import SignatureOut

_MARKUP = re.compile(r"([\\`*_{}\[\]|#~!()@:])")
_BLANK = re.compile(r"\s+")


def render(card: CardOut) -> str:
    parts = [front_matter(card), f"# {inline(card.adapter)}, version {card.number}", inline(card.description), _table(_facts(card))]
    parts += ["## Files", _table((file.path, f"`{file.sha256}` ({file.size} bytes)") for file in card.files)]
    if card.readme is not None:
        parts += ["## What its publisher wrote", f"README.md, `{card.readme.sha256}`, as it was pushed; Lorary did not check it."]
        parts += [_fenced(card.readme.text)]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(card: CardOut) -> str:
    """What the Hub reads of a model card."""
    base = card.base_model.upstream_names[0] if card.base_model.upstream_names else card.base_model.name
    tags = list(dict.fromkeys(["lora", *card.tags]))
    lines = [f"base_model: {quoted(base)}", "library_name: peft", "pipeline_tag: text-generation"]
    lines += [f"license: {quoted(card.license)}"] if card.license else []
    lines += ["tags:", *(f"- {quoted(tag)}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def quoted(text: str) -> str:
    """A double-quoted YAML scalar on one line; whatever cannot be printed is escaped."""
    return '"' + "".join(_yaml_char(char) for char in text) + '"'


def _yaml_char(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"


def inline(text: str) -> str:
    """Text on one line that Markdown shows as it is: no markup, no HTML, no link, no control or direction-changing character."""
    line = _BLANK.sub(" ", text).strip()
    shown = "".join(char if char.isprintable() else "\ufffd" for char in line)
    return html.escape(_MARKUP.sub(r"\\\1", shown), quote=False)


def _facts(card: CardOut) -> Iterator[tuple[str, str]]:
    yield "Digest", f"`{card.version_digest}`"
    yield "Status", card.status + (f": {inline(card.reason.detail)}" if card.reason else "")
    yield "Aliases", ", ".join(map(inline, card.aliases)) or "none"
    yield "Pushed", f"{card.pushed_at.isoformat()} by the key {inline(card.pushed_by.key_name or card.pushed_by.key_id)}"
    if card.imported_from is not None:
        source = card.imported_from
        where = f" of {inline(source.endpoint)}" if source.endpoint else " of the Hugging Face Hub"
        yield "Imported from", f"{inline(source.repo)}{where}, revision {inline(source.revision)}, commit {inline(source.commit)}"
    upstream = ", ".join(map(inline, card.base_model.upstream_names))
    yield "Base model", inline(card.base_model.name) + (f" ({upstream})" if upstream else "")
    yield "Base digest", f"`{card.base_model.base_digest}`"
    yield "Rank", str(card.rank)
    yield "Alpha", "unknown" if card.alpha is None else f"{card.alpha:g}" + (" (rank-stabilised)" if card.use_rslora else "")
    yield "Targets", ", ".join(map(inline, card.targets))
    yield "Weights", f"{card.num_params:,} parameters, {card.dtype or 'unknown dtype'}, {card.size_bytes:,} bytes"
    yield "Forms", ", ".join(f"{inline(form.kind)} `{form.form_digest}`" for form in card.forms) or "none yet"
    yield "Signature", _signature(card.signature)
    yield "Licence", inline(card.license or "not given")


def _signature(signature: SignatureOut) -> str:
    if signature.verified_at is None or signature.key is None:
        return signature.verdict
    by = f"by the key {inline(signature.key)} (`{signature.fingerprint}`) at {signature.verified_at.isoformat()}"
    if signature.key_revoked_at is not None:
        return f"verified {by}, which was **revoked** at {signature.key_revoked_at.isoformat()}"
    return f"verified {by}"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _fenced(text: str) -> str:
    """As a block of text behind a fence that is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"
