"""The page at `/` and the OpenAPI document."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
from servers import USER, Running, running

from saffron import SearchConfig
from saffron.serving import Settings
from saffron.serving.openapi import document

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# Stands behind the page's own script: types, sends by Enter, and waits for both answers and the tree.
PROBE = """
<script>
  (async () => {
    $("prompt").value = "hello there"; $("width").value = "3"; $("width").dispatchEvent(new Event("input"));
    $("prompt").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", cancelable: true }));
    while ($("search").hidden || $("send").disabled) await new Promise((go) => setTimeout(go, 5));
    const report = { at: $("at").textContent, defended: $("defended").textContent, other: $("undefended").textContent,
      tree: $("tree").srcdoc.length, focus: document.activeElement.id };
    const written = { id: "report", textContent: JSON.stringify(report) };
    document.body.append(Object.assign(document.createElement("pre"), written));
  })();
</script>
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    config = SearchConfig(width=2, max_new_tokens=4, min_new_tokens=0)
    with running(tiny.trio(), Settings(name="tiny", config=config, undefended=True, max_width=8)) as made:
        yield made


def test_the_page_needs_nothing_but_its_server(server: Running) -> None:
    with server.client() as client:
        answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"""(src|href)\s*=\s*["']|url\(|@import|https?://""", answer.text)
    labelled = set(re.findall(r'<label for="(\w+)"', answer.text)) | {"width", "tokens"}
    inputs = set(re.findall(r'<(?:input|textarea) id="(\w+)"', answer.text))
    assert inputs == labelled and 'lang="en"' in answer.text and answer.text.count('aria-live="polite"') == 2


def test_an_answer_may_bring_its_search_as_a_page(server: Running) -> None:
    said = server.ask(messages=USER, saffron={"trace": "page"}).json()["choices"][0]
    assert said["saffron"]["page"].startswith("<!doctype html>") and USER[0]["content"] in said["saffron"]["page"]
    assert "Undefended answer" not in said["saffron"]["page"]  # it stands next to the search, in the chat
    assert server.ask(saffron={"trace": "svg"}).status_code == 400


def test_scripts_in_answers_stay_text(server: Running) -> None:
    hostile = "</script><script>alert(1)</script>"
    page = server.ask(messages=[{"role": "user", "content": hostile}], saffron={"trace": "page"}).json()
    assert "<script>alert" not in page["choices"][0]["saffron"]["page"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
def test_the_page_in_a_browser(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jinja2 import Template

    plain = Template.render
    monkeypatch.setattr(
        Template, "render", lambda self, **k: plain(self, **k).replace("</body>", PROBE + "</body>", 1)
        if self.name == "chat.html" else plain(self, **k),
    )  # fmt: skip
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=100000",
        "--dump-dom",
    ]
    dom = subprocess.run([*command, server.url + "/"], capture_output=True, text=True, timeout=90).stdout
    found = re.search(r'<pre id="report">(.*?)</pre>', dom)
    assert found, "the page did not come to its answers"
    report = json.loads(found.group(1))
    assert report["at"] == "3" and "tokens" in report["defended"] and "tokens" in report["other"]
    assert report["tree"] > 10000 and report["focus"] == "prompt"


def test_the_openapi_document_names_every_route(server: Running) -> None:
    with server.client() as client:
        served = client.get("/openapi.json").json()
    assert served == json.loads(json.dumps(document(server.service.settings, server.service.variants)))
    routes = {route.path.replace(":path", "") for route in server.server.config.app.routes}  # type: ignore[union-attr]
    assert set(served["paths"]) == routes - {"/", "/openapi.json"}
    chat = served["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    asked = chat["properties"]["saffron"]["anyOf"][0]
    own = {field.name for field in fields(SearchConfig)} - {"max_new_tokens"} | {"method", "trace"}
    assert asked["properties"].keys() == own
    assert asked["properties"]["width"]["anyOf"][0]["maximum"] == 8
