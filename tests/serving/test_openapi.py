"""The OpenAPI document is true: answers are as it says, and what it calls wrong is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from json_schema import fits
from servers import USER, Running, running

from saffron import AdaptiveWidth, SearchConfig, WidthSettings
from saffron.models.bundled import Models
from saffron.serving import Settings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GOES_ON = {"continue_final_message": True, "add_generation_prompt": False}
BEGUN = [*USER, {"role": "assistant", "content": "the quick"}]


@pytest.fixture(scope="module")
def models() -> Models:
    return tiny.trio()


@pytest.fixture(scope="module")
def server(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    state: Path = tmp_path_factory.mktemp("state") / "state.npz"
    AdaptiveWidth(WidthSettings(widths=(1, 3), phases=2, phase_tokens=2, wide=3)).save(state)
    config = SearchConfig(width=2, max_new_tokens=4, min_new_tokens=0)
    settings = Settings(
        name="tiny", config=config, undefended=True, best_of_n=2, adaptive=state, max_width=4, max_tokens=8
    )
    with running(models, settings) as made:
        yield made


@pytest.fixture(scope="module")
def document(server: Running) -> dict[str, Any]:
    with server.client() as client:
        found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def asked(document: dict[str, Any], path: str) -> dict[str, Any]:
    schema: dict[str, Any] = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return schema


def check_answer(document: dict[str, Any], operation: dict[str, Any], said: Any) -> None:
    described = operation["responses"][str(said.status_code)].get("content", {})
    kind = said.headers.get("content-type", "").partition(";")[0]
    if not described:
        assert not said.content
        return
    assert kind in described
    if kind == "application/json":
        assert fits(said.json(), described[kind]["schema"]), said.text


@pytest.mark.parametrize("path, body", [
    (CHAT, {"messages": USER}),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 2, "saffron": {"trace": True}}),
    (CHAT, {"messages": BEGUN, **GOES_ON, "echo": True, "n": 2, "saffron": {"trace": "page", "reward_cap": None}}),
    (CHAT, {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, {"messages": USER, "model": "tiny-adaptive"}),
    (CHAT, {"messages": USER, "model": "tiny-undefended", "stop": []}),
    (CHAT, {"messages": USER, "model": "tiny-best-of-n", "saffron": {"n": 3, "top_p": 0.5}}),
    (CHAT, {"messages": USER, "modalities": ["text"], "temperature": None, "top_k": 3, "seed": 1}),
    (CHAT, {"messages": USER, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}], "refusal": None}]}),
    (TEXT, {"prompt": "the quick", "n": 2}),
    (TEXT, {"prompt": ["the quick", [5, 6]], "suffix": "", "logprobs": False}),
    (TEXT, {"prompt": "the quick", "echo": True, "logprobs": 2, "max_tokens": 0}),
    (TEXT, {"prompt": "the quick", "echo": True, "logprobs": 2, "add_special_tokens": False}),
    ("/tokenize", {"prompt": "the quick", "return_token_strs": True, "model": "tiny"}),
    ("/tokenize", {"messages": BEGUN, **GOES_ON}),
    ("/detokenize", {"tokens": [5, 6], "model": "tiny"}),
])  # fmt: skip
def test_what_is_served_is_described(
    path: str, body: dict[str, Any], server: Running, document: dict[str, Any]
) -> None:
    assert fits(body, asked(document, path))
    with server.client() as client:
        said = client.post(path, json=body)
    assert said.status_code == 200, said.text
    check_answer(document, document["paths"][path]["post"], said)


@pytest.mark.parametrize("path, body", [
    (CHAT, {"messages": USER, "tools": 0}),
    (CHAT, {"messages": USER, "tools": ["text"]}),
    (CHAT, {"messages": USER, "modalities": ["text", "audio"]}),
    (CHAT, {"messages": USER, "model": "another"}),
    (CHAT, {"messages": USER, "saffron": {"lm_head_bias": 1}}),
    (CHAT, {"messages": USER, "saffron": {"ranking": "best"}}),
    (CHAT, {"messages": USER, "saffron": {"method": "tiny"}}),
    (CHAT, {"messages": USER, "stream": True, "stream_options": {"include_usage": None}}),
    (TEXT, {"prompt": "the quick", "suffix": 0}),
    (TEXT, {"prompt": "the quick", "add_special_tokens": 1}),
    (TEXT, {"prompt": "the quick", "logprobs": True}),
    ("/tokenize", {"prompt": "the quick", "words": 1}),
    ("/detokenize", {"tokens": ["the"]}),
])  # fmt: skip
def test_what_is_described_as_wrong_is_refused(
    path: str, body: dict[str, Any], server: Running, document: dict[str, Any]
) -> None:
    assert not fits(body, asked(document, path))
    with server.client() as client:
        said = client.post(path, json=body)
    assert said.status_code in (400, 404), said.text
    check_answer(document, document["paths"][path]["post"], said)


def test_the_other_operations(server: Running, document: dict[str, Any]) -> None:
    with server.client() as client:
        for path, operations in document["paths"].items():
            if "get" in operations:
                for name in ("tiny", "another") if "{id}" in path else ("",):
                    check_answer(document, operations["get"], client.get(path.replace("{id}", name)))
            else:
                check_answer(document, operations["post"], client.get(path))  # 405


def test_texts_without_the_begin_token(server: Running, models: Models) -> None:
    """As vLLM has it; log-likelihood harnesses that render a begin token themselves need it."""
    plain = models.policy.encoder.text("the quick")
    counts = {}
    for special in (True, False):
        with server.client() as client:
            body = {"prompt": "the quick", "add_special_tokens": special}
            counts[special] = client.post(TEXT, json=body).json()["usage"]["prompt_tokens"]
            tokenized = client.post("/tokenize", json=body).json()["count"]
        assert counts[special] == tokenized
    assert counts[False] == len(plain)


def test_operations_that_need_no_key_say_so(models: Models) -> None:
    config = SearchConfig(width=1, max_new_tokens=2, min_new_tokens=0)
    with running(models, Settings(config=config, api_keys=("key",))) as server, server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
        for path, operations in paths.items():
            if "get" in operations:
                locked = client.get(path.replace("{id}", "saffron")).status_code == 401
                assert locked is (operations["get"].get("security") != []), path
    assert json.dumps(paths).count('"security": []') == 3
