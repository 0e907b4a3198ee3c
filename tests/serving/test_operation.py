"""What operators need: slots that come back, limits, keys, drains, logs without prompts; over tiny random models."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from servers import Running, httpx, running, until

from saffron import SearchConfig
from saffron.models.bundled import Models
from saffron.serving import Settings

CONFIG = SearchConfig(width=2, max_new_tokens=8, min_new_tokens=0)
HELLO = [{"role": "user", "content": "hello there"}]
LONG = {"max_tokens": 200, "saffron": {"min_new_tokens": 200}}  # 200 steps


@pytest.fixture(scope="module")
def models() -> Models:
    return tiny.trio()


@pytest.fixture(scope="module")
def server(models: Models) -> Iterator[Running]:
    settings = Settings(config=CONFIG, max_batch=2, queue=2, max_tokens=240, undefended=True, max_body=5000)
    with running(models, settings) as made:
        yield made


def idle(server: Running) -> bool:
    engine, models = server.service.engine, server.service.models
    assert engine is not None and models is not None
    slots = models.policy.kv.num_nodes + models.mrm.kv.num_nodes
    return not engine.busy and not server.service.unfinished and slots == 0


def ask(server: Running, **body: Any) -> Any:
    return server.ask(**{"messages": HELLO, **body})


@contextlib.contextmanager
def left_open(server: Running, **body: Any) -> Iterator[socket.socket]:
    """A request whose answer nobody reads; the connection is closed at the end of the block."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps({"messages": HELLO, **body})
    with socket.create_connection((host, int(port))) as connection:
        head = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n{data}".encode())
        yield connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["saffron", "saffron-undefended"])
def test_a_client_that_goes_away_frees_its_slots(stream: bool, model: str, server: Running) -> None:
    engine = server.service.engine
    assert engine is not None
    before = server.service.metrics.cancelled._value.get()
    body = LONG if model == "saffron" else {"max_tokens": 200, "saffron": {"min_new_tokens": 200}}
    with left_open(server, stream=stream, model=model, **body):
        until(lambda: engine.running == 1 and server.service._unfinished)
        (pending,) = server.service._unfinished
    until(lambda: idle(server))
    assert pending.cancelled and pending.error is not None  # it did not run to its end
    until(lambda: server.service.metrics.cancelled._value.get() == before + 1)


def test_prompts_of_one_request_run_at_once(server: Running) -> None:
    engine = server.service.engine
    assert engine is not None
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps({"prompt": ["hello", "there"], "max_tokens": 200, "saffron": {"min_new_tokens": 200}})
    with socket.create_connection((host, int(port))) as connection:
        head = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{data}".encode())
        until(lambda: engine.running == 2)
    until(lambda: idle(server))
    with server.client() as client:
        many = client.post("/v1/completions", json={"prompt": ["hello"] * 3})
    assert many.status_code == 400 and "at most 2" in many.json()["error"]["message"]  # as many as may wait


def test_the_undefended_model_streams_its_tokens(server: Running) -> None:
    said = server.ask(model="saffron-undefended", max_tokens=6, saffron={"min_new_tokens": 6}).json()
    streamed = server.ask(model="saffron-undefended", max_tokens=6, saffron={"min_new_tokens": 6}, stream=True).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content") for event in events]
    assert "".join(filter(None, pieces)) == said["choices"][0]["message"]["content"]
    assert len(list(filter(None, pieces))) > 1


def test_a_search_ends_within_a_step_of_the_departure(server: Running) -> None:
    engine = server.service.engine
    assert engine is not None
    with left_open(server, **LONG):
        until(lambda: engine.running == 1 and server.service._unfinished)
        (pending,) = server.service._unfinished
    until(lambda: pending.cancelled)
    steps = len(pending.tree.steps)
    until(lambda: pending.done)
    assert len(pending.tree.steps) <= steps + 1


def test_a_client_that_leaves_before_its_body_is_there(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    before = server.service.metrics.cancelled._value.get()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "host: x\r\ncontent-type: application/json\r\ncontent-length: 100"
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n{{".encode())
        time.sleep(0.05)
    until(lambda: server.service.metrics.cancelled._value.get() == before + 1)
    assert "failed" not in caplog.text


def test_a_client_that_leaves_the_queue_makes_room(server: Running) -> None:
    engine = server.service.engine
    assert engine is not None
    with left_open(server, **LONG), left_open(server, **LONG):
        until(lambda: engine.running == 2)
        with left_open(server, **LONG), left_open(server, **LONG):
            until(lambda: engine.waiting == 2)
            refused = ask(server)
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
            assert refused.headers["retry-after"] == "1"
            text = server.service.metrics.text().decode()
            assert "saffron:num_requests_running 2.0" in text and "saffron:num_requests_waiting 2.0" in text
        until(lambda: engine.waiting == 0)
    assert ask(server).status_code == 200
    until(lambda: idle(server))


def test_a_short_request_does_not_wait_for_a_long_one(server: Running) -> None:
    engine = server.service.engine
    assert engine is not None
    with left_open(server, **LONG):
        until(lambda: engine.running == 1)
        (long,) = server.service._unfinished
        before = len(long.tree.steps)
        assert ask(server, max_tokens=2).status_code == 200
        assert not long.done and len(long.tree.steps) - before < 60
    until(lambda: idle(server))


def test_deadlines(models: Models) -> None:
    with running(models, Settings(config=CONFIG, timeout=0.2, max_tokens=240)) as server:
        late = ask(server, **LONG)
        assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
        assert late.headers["x-should-retry"] == "false"
        until(lambda: idle(server))
        streamed = ask(server, stream=True, **LONG)
        *_, last = [line for line in streamed.text.splitlines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert ask(server, max_tokens=1).status_code == 200


def test_keys(models: Models) -> None:
    with running(models, Settings(config=CONFIG, api_keys=("first", "second"))) as server, server.client() as client:
        for key in ("", "Bearer", "Bearer wrong", "Bearer first2", "first", "Basic first"):
            answer = client.get("/v1/models", headers={"authorization": key})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("Bearer first", "bearer second"):
            assert client.get("/v1/models", headers={"authorization": key}).status_code == 200
        assert ask(server).status_code == 401 and client.get("/health").status_code == 200


def test_caps(models: Models) -> None:
    with running(models, Settings(config=CONFIG, max_beam_tokens=40, prefill=False)) as server:
        refused = ask(server, max_tokens=11, saffron={"width": 4})
        assert refused.status_code == 400 and "exceed the 40" in refused.json()["error"]["message"]
        assert ask(server, saffron={"width": 20}).json()["usage"]["completion_tokens"] <= 2
        begun = [*HELLO, {"role": "assistant", "content": "Sure"}]
        refused = ask(server, messages=begun, continue_final_message=True, add_generation_prompt=False)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "prefill_disabled"


def test_a_cache_that_could_never_hold_it(models: Models) -> None:
    with running(models, Settings(config=CONFIG, cache_tokens=30)) as server:
        refused = ask(server, max_tokens=100)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "capacity_exceeded"


@pytest.mark.parametrize("body, status", [
    (b"{", 400), (b"[]", 400), (b"null", 400), (b"\xff", 400), (b'{"n": ' + b"9" * 4400 + b"}", 400),
    (b'{"messages": ' + b"[" * 2400 + b"]" * 2400 + b"}", 400), (b'{"a":' * 200 + b"1" + b"}" * 200, 400),
    (b'{"temperature": NaN}', 400), (b" " * 6000, 413),
])  # fmt: skip
def test_poisoned_bodies(body: bytes, status: int, server: Running) -> None:
    with server.client() as client:
        answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status and answer.json()["error"]["message"]
        other = client.post("/v1/chat/completions", content=body, headers={"content-type": "text/plain"})
        assert other.status_code == 415


def test_names_of_control_tokens_are_text(server: Running) -> None:
    plain, marked = (ask(server, messages=[{"role": "user", "content": text}]) for text in ("hello", "hello</s><s>"))
    assert marked.status_code == 200
    assert marked.json()["usage"]["prompt_tokens"] > plain.json()["usage"]["prompt_tokens"] + 2


def test_a_poisoned_search_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    """One token's embedding is NaN: requests that say it fail, those next to them are answered."""
    models = tiny.trio(seed=3)
    settings = Settings(config=CONFIG, max_tokens=240)
    with running(models, settings) as server, caplog.at_level(logging.INFO, "saffron.serving"):
        good = ask(server).json()["choices"][0]["message"]
        poison = models.policy.encode("Z")[0]
        models.policy.model.get_input_embeddings().weight.data[poison] = torch.nan
        secret = [{"role": "user", "content": "Z secret word"}]
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda m: ask(server, messages=m), [HELLO, secret, HELLO]))
        assert [a.status_code for a in answers] == [200, 500, 200]
        assert answers[0].json()["choices"][0]["message"] == answers[2].json()["choices"][0]["message"] == good
        error = answers[1].json()["error"]
        assert error["code"] == "internal_error" and answers[1].headers["x-request-id"] in error["message"]
        assert "finite" not in error["message"]
        streamed = ask(server, messages=secret, stream=True)
        assert '"internal_error"' in streamed.text and "[DONE]" not in streamed.text
        until(lambda: idle(server))
    assert answers[1].headers["x-request-id"] in caplog.text and "NumericalError" in caplog.text
    assert "secret" not in caplog.text and "hello" not in caplog.text and good["content"] not in caplog.text


def test_request_ids(server: Running) -> None:
    with server.client() as client:
        assert client.get("/health", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
        made = client.get("/health", headers={"x-request-id": 'a"b' + "x" * 200}).headers["x-request-id"]
        assert len(made) == 32 and made != client.get("/health").headers["x-request-id"]


def test_silent_streams_say_that_they_are_alive(models: Models) -> None:
    with running(models, Settings(config=CONFIG, keep_alive=0.05, max_tokens=240)) as server:
        assert ": keep-alive\n\n" in ask(server, stream=True, **LONG | {"max_tokens": 60}).text


def test_loading_and_draining(models: Models) -> None:
    go_on = threading.Event()

    def load() -> Models:
        go_on.wait(60)
        return models

    entered: list[Running] = []

    def wait_for_it() -> None:
        with running(load, Settings(config=CONFIG, max_tokens=240)) as server:
            entered.append(server)
            until(lambda: server.service.unfinished == 1)
        # The end of the block drains, as SIGTERM does.

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    time.sleep(0.1)
    go_on.set()
    until(lambda: bool(entered))
    (server,) = entered
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, max_tokens=60, saffron={"min_new_tokens": 60})
        until(lambda: server.service.state == "draining")
        refused = ask(server)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert answer.result().status_code == 200
    thread.join(60)
    assert not thread.is_alive() and server.service.engine is not None and not server.service.engine.busy
    with pytest.raises(httpx.ConnectError):
        ask(server)


def test_what_outlives_the_drain_gets_503(models: Models) -> None:
    with ThreadPoolExecutor(1) as pool:
        with running(models, Settings(config=CONFIG, max_tokens=240), drain_seconds=0.1) as server:
            answer = pool.submit(ask, server, **LONG)
            until(lambda: server.service.unfinished == 1)
        late = answer.result()
    assert late.status_code == 503 and late.json()["error"]["code"] == "cancelled"


def test_requests_before_the_models_are_there_get_503(models: Models) -> None:
    from starlette.testclient import TestClient

    from saffron.serving import create_app

    go_on = threading.Event()
    app = create_app(lambda: models if go_on.wait(60) else models, Settings(config=CONFIG))
    with TestClient(app) as client:
        for path in ("/health", "/v1/models"):
            assert client.get(path).json()["error"]["code"] == "loading"
        go_on.set()
        until(lambda: client.get("/health").status_code == 200)


def test_the_command(tmp_path: Any) -> None:
    """`saffron serve` starts, answers and ends at SIGTERM with status 0; what it logs holds no prompt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    command = [sys.executable, "-m", "saffron.cli", "serve", "--port", str(port), "--width", "2", "--threads", "1",
               "--api-key-file", str(keys), "--no-guard", "--expose-undefended"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": "Bearer two"}) as client:

                def up() -> bool:
                    with contextlib.suppress(httpx.TransportError):
                        return client.get("/health").status_code == 200
                    assert process.poll() is None
                    return False

                until(up, 120)
                said = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2}, timeout=60)
                assert said.status_code == 200 and said.json()["model"] == "saffron-bundled"
                assert "guard" not in said.json()["choices"][0]["saffron"]
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and "POST '/v1/chat/completions' 200" in err and "hello" not in err
