"""Cards: facts in JSON and Markdown, the tenant's README beside them, and nothing that strangers write becomes markup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from registry.adapters import card_markdown
from registry.adapters.schemas import CardOut
from tests.registry.adapters.pushing import Pusher, adapter, sha256

GOOD = adapter(1)
README = b"---\r\nlicense: apache-2.0\r\n---\r\n# Pirate\n```\n\xff<script>alert(1)</script>\n| Signature | verified |\n"
NASTY = [
    "plain",
    'a"b\\c',
    "- x: y\n---\nlicense: mit",
    "\u2028evil: 1",
    "\x07bell \u202e",
    "<img src=x onerror=alert(1)>",
    "![x](http://e/)",
    "a | b",
    "`x`",
    "🏴‍☠️ arr",
    "yes",
    "http://evil.example a@evil.example",
]


def markdown_of(tenant: Pusher, number: int = 1) -> str:
    answer = tenant.call("GET", f"/adapters/pirate/versions/{number}/card?format=markdown")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    return str(answer.content.decode())


def test_a_card_tells_who_from_what_with_what(acme: Pusher, work: Callable[[], int]) -> None:
    pushed = acme.push("pirate", GOOD.files | {"README.md": README}, description="Talks like one.", tags=["fun"]).json()
    pending = acme.get("/adapters/pirate/versions/1/card")
    assert (pending["status"], pending["forms"], pending["aliases"]) == ("pending", [], [])
    assert work() == 1
    version, card = acme.get("/adapters/pirate/versions/1"), acme.get("/adapters/pirate/versions/1/card")
    for field in ("version_digest", "rank", "targets", "num_params", "size_bytes", "files", "forms", "signature"):
        assert card[field] == version[field], field
    assert card["pushed_by"] == {"key_id": pushed["created_by"], "key_name": "test"}
    assert (card["base_model"]["name"], len(card["base_model"]["base_digest"])) == ("tiny", 64)
    assert (card["aliases"], card["license"], card["imported_from"]) == (["default"], "apache-2.0", None)
    assert (card["alpha"], card["dtype"]) == (GOOD.config["lora_alpha"], "F32")
    assert card["readme"] == {"sha256": sha256(README), "size": len(README), "text": README.decode("utf-8", "replace")}
    assert acme.call("GET", "/adapters/pirate/versions/1/files/README.md").content == README
    text = markdown_of(acme)
    told = ModelCard(text).data.to_dict()
    assert (told["license"], told["library_name"], told["base_model"]) == ("apache-2.0", "peft", card["base_model"]["upstream_names"][0])
    assert told["tags"] == ["lora", "fun"]
    for fact in (card["version_digest"], "Talks like one", "by the key test", "unsigned", card["forms"][0]["form_digest"]):
        assert fact in text
    assert "<script>" not in rendered(text).replace("&lt;script&gt;", ""), "the README is shown as text"
    assert rendered(text).count("<table>") == 2, "and adds no facts"


def test_a_card_is_made_of_what_there_is(acme: Pusher, app: FastAPI) -> None:
    assert acme.push("pirate", adapter(2).files, tags=["license:mit"]).status_code == 201
    assert acme.get("/adapters/pirate/versions/1/card")["license"] == "mit"
    version = acme.get("/adapters/pirate/versions/1")
    for blob in list(app.state.blob_store.list()):
        app.state.blob_store.delete(blob.tenant_id, blob.sha256)
    card = acme.get("/adapters/pirate/versions/1/card")
    assert (card["alpha"], card["dtype"], card["rank"]) == (None, None, version["rank"])
    assert "unknown dtype" in markdown_of(acme)
    assert acme.call("GET", "/adapters/pirate/versions/2/card").status_code == 404
    assert acme.call("GET", "/adapters/pirate/versions/1/card?format=html").status_code == 422


def nasty(card: dict[str, Any], text: str) -> CardOut:
    """A card in which a stranger wrote `text` wherever strangers write."""
    changed = {"description": text, "tags": [text], "aliases": [text], "targets": [text], "license": text}
    changed |= {"pushed_by": {"key_id": "k", "key_name": text}, "reason": {"code": "x", "detail": text}}
    changed |= {"base_model": card["base_model"] | {"upstream_names": [text]}}
    changed |= {"imported_from": {"endpoint": text, "repo": text, "revision": text, "commit": text, "imported_at": card["pushed_at"]}}
    changed |= {"readme": {"sha256": "0" * 64, "size": 1, "text": text}}
    return CardOut.model_validate(card | changed)


def rendered(text: str) -> str:
    """As GitHub's Markdown without the front matter: HTML passes, tables and bare links are on."""
    body = text.split("\n---\n", 1)[1]
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))


def test_what_strangers_write_stays_text(acme: Pusher) -> None:
    assert acme.push("pirate", GOOD.files).status_code == 201
    plain = acme.get("/adapters/pirate/versions/1/card")
    shape = rendered(card_markdown.render(nasty(plain, "plain")))
    for text in NASTY:
        made = card_markdown.render(nasty(plain, text))
        front = yaml.safe_load(made.split("\n---\n", 1)[0].removeprefix("---\n"))
        assert front == {
            "base_model": text,
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            "license": text,
            "tags": ["lora", text],
        }
        page = rendered(made)
        for tag in ("<table>", "<tr>", "<td>", "<h1>", "<h2>", "<a ", "<img", "<script", "<hr", "<em>", "<strong>", "<code"):
            assert page.count(tag) == shape.count(tag), (text, tag)
        assert all(char.isprintable() or char == "\n" for char in made.rsplit("```text", 1)[0])


@pytest.mark.parametrize("text", ["```", "````\n# out\n````", "~~~\n</code>"])
def test_a_readme_does_not_leave_its_block(acme: Pusher, text: str) -> None:
    assert acme.push("pirate", GOOD.files).status_code == 201
    made = card_markdown.render(nasty(acme.get("/adapters/pirate/versions/1/card"), text))
    assert rendered(made).count("<pre>") == 1
    assert rendered(made).rstrip().endswith("</code></pre>")
