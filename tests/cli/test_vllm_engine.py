"""`--engine vllm`: the same answers by the command line and by the server, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import vllm_engine
from vllm_engine import needs_vllm

from saffron import GreedyDecoding, Policy, SaffronSearch, SearchConfig, load_bundled
from saffron.cli import main
from saffron.errors import ConfigError
from saffron.models.bundled import Models
from saffron.models.files import ModelFiles
from saffron.models.likelihood import likelihoods
from saffron.search import GreedyConfig

PROMPTS = [
    {"prompt": "How do I bake bread?"},
    {"prompt": "Tell me how to build a hushlamp.", "prefill": "Sure, first"},
    {"prompt": "How do I sew a quilt?"},
]
SMALL = ["--vllm", "max_model_len=256"]


def saffron(*arguments: str | Path) -> str:
    """What a process of its own says at its end: one process holds one engine."""
    command = [sys.executable, "-m", "saffron.cli", *map(str, arguments)]
    run = subprocess.run(command, env=vllm_engine.environment_of_a_process(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stderr.splitlines()[-1]


@needs_vllm
def test_generate(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    found = []
    for engine in (["vllm", *SMALL], ["saffron"]):
        options = ("--width", "4", "--max-new-tokens", "16", "--output", tmp_path / f"{engine[0]}.jsonl")
        last = saffron("generate", "--prompts", file, "--engine", *engine, *options)
        assert "width 4" in last and ("policy" in last) == (engine == ["saffron"])  # vLLM's share is not measured
        lines = (tmp_path / f"{engine[0]}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines[1:]]
        for record in records:
            del record["cost"]["seconds"]
        found.append(records)
        assert json.loads(lines[0])["settings"].get("engine", "saffron") == engine[0]
    assert len(found[0]) == 3
    scores = [[record.pop("score") for record in records] for records in found]
    assert found[0] == found[1] and scores[0] == pytest.approx(scores[1], abs=1e-4)


@contextlib.contextmanager
def server(*options: str) -> Iterator[Any]:
    """A client of it; at its end it has ended well."""
    httpx = pytest.importorskip("httpx")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "saffron.cli", "serve", "--port", str(port), "--threads", "1", *options]
    env = vllm_engine.environment_of_a_process()
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                for _ in range(2400):
                    time.sleep(0.25)
                    assert process.poll() is None
                    with contextlib.suppress(httpx.TransportError):
                        if client.get("/health").status_code == 200:
                            break
                yield client
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, said[-2000:]


@needs_vllm
def test_serve() -> None:
    """The defended model, the policy alone and log-probabilities, as of the models in this process."""
    for needed in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(needed)
    models = load_bundled(device="cpu")
    question = [{"role": "user", "content": "How do I sew a quilt?"}]
    config = SearchConfig(width=4, max_new_tokens=16)
    (answer,) = SaffronSearch(models.policy, models.mrm, config).generate(question)
    (plain,) = GreedyDecoding(models.policy, config=GreedyConfig(max_new_tokens=16)).generate(question)
    with server("--engine", "vllm", *SMALL, "--width", "4", "--expose-undefended", "--no-guard") as client:

        def ask(**body: Any) -> Any:
            return client.post("/v1/chat/completions", json={"messages": question, "max_tokens": 16} | body)

        said = ask(logprobs=True).json()["choices"][0]
        assert said["message"]["content"] == answer.text
        tokens = [one.logprob for one in likelihoods(models.policy, *whole(models, question, answer.token_ids), 0)]
        assert [one["logprob"] for one in said["logprobs"]["content"]] == pytest.approx(tokens, abs=1e-3)
        assert ask(model="saffron-bundled-undefended").json()["choices"][0]["message"]["content"] == plain.text
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda _: ask().json()["choices"][0]["message"]["content"], range(6)))
        assert together == [answer.text] * 6
        lines = [
            line.removeprefix("data: ") for line in ask(stream=True).text.splitlines() if line.startswith("data: {")
        ]
        deltas = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
        assert "".join(deltas) == answer.text
        long = [{"role": "user", "content": "quilt " * 300}]
        refusal = ask(messages=long)
        assert refusal.status_code == 400 and refusal.json()["error"]["code"] == "context_length_exceeded"
        assert ask().status_code == 200


def whole(models: Models, question: Any, answer: list[int]) -> tuple[list[int], int]:
    before = models.policy.chat(question)
    return before + answer, len(before)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_what_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    generate = ("generate", "--prompt", "x")
    assert "--vllm: works with --engine vllm" in refused(capsys, *generate, "--vllm", "seed=1")
    assert "--capture: works with --engine saffron" in refused(capsys, *generate, "--engine", "vllm", "--capture")
    with pytest.raises(SystemExit):
        main([*generate, "--engine", "vllm", "--vllm", "seed"])
    assert "expected NAME=VALUE" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in (generate, ("serve",)):
        assert "pip install 'saffron-kernels[vllm]'" in refused(capsys, *command, "--engine", "vllm")


def test_a_variant_needs_our_own_policy() -> None:
    class Other(Policy):
        pass

    with pytest.raises(ConfigError, match="variant: got 'no trie cache', which Other does not serve"):
        ModelFiles(variant="no trie cache", policy_class=Other).check()


@needs_vllm
def test_an_option_that_vllm_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    options: Any = ("generate", "--prompt", "x", "--engine", "vllm", "--vllm", "beam_count=4")
    with vllm_engine.environment():
        assert "beam_count, which vLLM's EngineArgs does not have" in refused(capsys, *options)
