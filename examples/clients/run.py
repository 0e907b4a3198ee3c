"""Other people's tools against `saffron serve`, each in an environment of its own.

    python examples/clients/run.py litellm lm-eval inspect garak schemathesis

Makes the environment below --environments if it is not there, starts a server on the bundled models, runs the tool in
small and prints its version and its last lines. Status 1 if a tool failed, or did not say what it says where all went
well. The server's environment is the one that runs this script.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

NAME = "bench"
Run = Callable[
    [Path, str, Path], list[str]
]  # environment's programs, the server's address, a scratch folder -> command

LITELLM = """
import sys, litellm
for model in ("openai/bench", "hosted_vllm/bench", "openai/bench-undefended"):
    ask = dict(model=model, api_base=sys.argv[1] + "/v1", api_key="none", max_tokens=12,
               messages=[{"role": "user", "content": "How do I build a bench?"}])
    said = litellm.completion(**ask)
    pieces = "".join(c.choices[0].delta.content or "" for c in litellm.completion(**ask, stream=True))
    assert pieces == said.choices[0].message.content and said.usage.completion_tokens == 12
    print(model, repr(pieces))
"""
INSPECT = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
@task
def bench():
    return Task(dataset=[Sample(input="How do I build a bench?", target="build")], solver=generate(), scorer=includes())
"""
QUESTION = {"question": "How do I build a", "choices": [" bench in my shed", "zzqq"], "label": 0}
TASK = """task: bench_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}]
"""


def litellm(programs: Path, url: str, scratch: Path) -> list[str]:
    return [str(programs / "python"), "-c", LITELLM, url]


def lm_eval(programs: Path, url: str, scratch: Path) -> list[str]:
    """Log-likelihoods: an accuracy of 1 where the prompt's log-probabilities arrive, chance where they do not."""
    (scratch / "data.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (scratch / "bench_choice.yaml").write_text(TASK % (scratch / "data.jsonl"))
    arguments = f"model={NAME},base_url={url}/v1/completions,tokenizer_backend=remote,tokenized_requests=False"
    return [str(programs / "lm_eval"), "--model", "local-completions", "--model_args", arguments, "--tasks",
            "bench_choice", "--include_path", str(scratch)]  # fmt: skip


def inspect(programs: Path, url: str, scratch: Path) -> list[str]:
    (scratch / "bench.py").write_text(INSPECT)
    return [str(programs / "inspect"), "eval", "bench.py", "--model", f"openai-api/saffron/{NAME}",
            "--display", "plain", "--max-tokens", "16", "--log-dir", str(scratch)]  # fmt: skip


def garak(programs: Path, url: str, scratch: Path) -> list[str]:
    options = {"openai": {"OpenAICompatible": {"uri": f"{url}/v1/", "max_tokens": 16}}}
    (scratch / "options.json").write_text(json.dumps(options))
    return [str(programs / "python"), "-m", "garak", "--model_type", "openai.OpenAICompatible", "--model_name", NAME,
            "--generator_option_file", str(scratch / "options.json"), "--probes", "test.Test"]  # fmt: skip


def schemathesis(programs: Path, url: str, scratch: Path) -> list[str]:
    """Requests by the server's own OpenAPI document, right and wrong ones: no 5xx, and answers as the document says.

    What no schema can say (turns alternate, `n` is at most the width, ids are below the vocabulary's size) may be
    refused, so the check that all right requests are accepted is left out.
    """
    return [str(programs / "st"), "run", f"{url}/openapi.json", "--checks", "all", "--exclude-checks",
            "positive_data_acceptance", "--max-examples", "50", "--seed", "1", "--request-timeout", "60",
            "--continue-on-failure", "--no-color"]  # fmt: skip


# Packages, command, and what a tool says that was served: some end with status 0 anyhow.
TOOLS: dict[str, tuple[str, Run, str]] = {
    "litellm": ("litellm", litellm, r"^openai/bench-undefended '"),
    "lm-eval": ("lm-eval[api]", lm_eval, r"bench_choice.*acc *\|.*\| +1\|"),
    "inspect": ("inspect-ai openai", inspect, r"^accuracy +1\.0"),
    "garak": ("garak", garak, r"test\.Test.*ok on +40/ +40"),
    "schemathesis": ("schemathesis", schemathesis, r"(\d+) generated, \1 passed"),
}


@contextlib.contextmanager
def server() -> Iterator[str]:
    """`saffron serve` on the bundled models, both sides."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "saffron.cli", "serve", "--name", NAME, "--width", "2", "--port", str(port)]
    limits = ["--max-new-tokens", "24", "--max-tokens", "32", "--max-width", "4"]
    process = subprocess.Popen([*command, *limits, "--expose-undefended", "--quiet"])
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def programs_of(tool: str, folder: Path) -> Path:
    """The environment's programs; made and filled if it is not there."""
    home = folder / tool
    if not (home / "ready").exists():
        venv.create(home, with_pip=True)
        packages = TOOLS[tool][0].split()
        subprocess.run([home / "bin" / "pip", "install", "-q", *packages], check=True)
        (home / "ready").touch()
    return home / "bin"


def version_of(programs: Path, tool: str) -> str:
    package = TOOLS[tool][0].split()[0].partition("[")[0]
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([programs / "python", "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="+", choices=list(TOOLS))
    parser.add_argument("--environments", type=Path, default=Path(".client-environments"))
    options = parser.parse_args()
    failed = 0
    environment = {
        **os.environ,
        "OPENAICOMPATIBLE_API_KEY": "none",
        "SAFFRON_API_KEY": "none",
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    with server() as url:
        for tool in options.tools:
            programs = programs_of(tool, options.environments.resolve())
            with tempfile.TemporaryDirectory() as scratch:
                command = TOOLS[tool][1](programs, url, Path(scratch))
                own = {**environment, "SAFFRON_BASE_URL": f"{url}/v1"}
                done = subprocess.run(command, env=own, capture_output=True, text=True, cwd=scratch)
            last = done.stdout.splitlines()[-20:] + (done.stderr.splitlines()[-40:] if done.returncode else [])
            print(f"== {tool} {version_of(programs, tool)}: status {done.returncode}", *last, sep="\n", flush=True)
            failed += done.returncode != 0 or not re.search(TOOLS[tool][2], done.stdout, re.MULTILINE)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
