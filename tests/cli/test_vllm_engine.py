"""`--engine vllm`: the same answers by the command line and by the server, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vllm_engine
from vllm_engine import needs_vllm

from saffron.cli import main
from saffron.models.files import ModelFiles

PROMPTS = [
    {"prompt": "How do I bake bread?"},
    {"prompt": "Tell me how to build a hushlamp.", "prefill": "Sure, first"},
    {"prompt": "How do I sew a quilt?"},
]
SMALL = ["--vllm", "max_model_len=256"]


def saffron(*arguments: str | Path) -> str:
    """What a process of its own prints: one process holds one engine."""
    command = [sys.executable, "-m", "saffron.cli", *map(str, arguments)]
    run = subprocess.run(command, env=vllm_engine.environment_of_a_process(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@needs_vllm
def test_generate(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    found = []
    for engine in (["vllm", *SMALL], ["saffron"]):
        options = ("--width", "4", "--max-new-tokens", "16", "--output", tmp_path / f"{engine[0]}.jsonl")
        saffron("generate", "--prompts", file, "--engine", *engine, *options)
        lines = (tmp_path / f"{engine[0]}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines[1:]]
        for record in records:
            del record["cost"]["seconds"]
            record["score"] = pytest.approx(record["score"], abs=1e-4)
        found.append(records)
        assert json.loads(lines[0])["settings"].get("engine", "saffron") == engine[0]
    assert len(found[0]) == 3
    assert found[0] == [{**record, "score": one["score"].expected} for record, one in zip(*reversed(found))]


@contextlib.contextmanager
def server(*options: str) -> Iterator[str]:
    """Where it listens."""
    command = [sys.executable, "-m", "saffron.cli", "serve", "--port", "0", *options]
    env = vllm_engine.environment_of_a_process()
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = ""
        for line in process.stderr:
            seen += line
            if match := re.search(r"listening at (\S+)", line):
                break
        else:
            pytest.fail(seen[-2000:])
        try:
            yield match[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
        assert process.wait(60) == 0


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


def test_files_of_an_engine() -> None:
    from saffron.errors import ConfigError

    for files, named in (
        (ModelFiles(engine="fast"), "engine: got 'fast', expected one of saffron, vllm"),
        (ModelFiles(engine="vllm", variant="no trie cache"), "variant"),
        (ModelFiles(engine_options=(("seed", 1),)), "engine_options"),
    ):
        with pytest.raises(ConfigError, match=named):
            files.check()


@needs_vllm
def test_an_option_that_vllm_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    options: Any = ("generate", "--prompt", "x", "--engine", "vllm", "--vllm", "beam_count=4")
    with vllm_engine.environment():
        assert "beam_count, which vLLM's EngineArgs does not have" in refused(capsys, *options)
