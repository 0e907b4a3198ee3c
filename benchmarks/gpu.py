"""What a GPU that is lent for minutes is asked, most telling first: two parts of at most five minutes each.

    benchmarks/gpu.sh FOLDER first       builds, every op against the reference, a captured search, the main timings
    benchmarks/gpu.sh FOLDER second      the wider grids, larger steps, memcheck, ncu
    benchmarks/gpu.sh FOLDER STAGE...    stages by name; some belong to no part: tests racecheck synccheck competitors

Each stage may take its seconds, and what those before it have left; then it gets SIGINT, on which pytest writes what
failed, SIGTERM and SIGKILL. One that fails stops no other, and the last line of the summary names the first of them.
What was measured until then is in results.csv.

Everything is in FOLDER, each file with GPU, versions and commit: summary.txt, log.txt, results.csv, left-out.txt,
table.md, decisions.md, ncu.csv. A second call with the same folder adds to them. Where the checkout came without its
.git, SAFFRON_COMMIT names the commit.

`build` builds both native modules for this GPU (SAFFRON_CUDA_ARCHS: another one) where they are imported; modules that
are there, of this Python and of these sources by SAFFRON_PREBUILT=1, are taken as they are. FlashInfer, where it is
installed, compiles at its first call: `competitors` does that before anything is timed.

What has to be installed: torch, triton, transformers, numpy, rich, jinja2, pytest, for `captured` hypothesis, and for a
build pybind11, cmake, ninja, a C++ compiler and nvcc.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FILES = ("summary.txt", "log.txt", "results.csv", "left-out.txt", "table.md", "decisions.md", "ncu.csv")
GRACE = ((signal.SIGINT, 8.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0))  # seconds that each is waited for
# Without the options of pyproject.toml, which need pytest-benchmark; pytest-xdist would start no sooner.
PYTEST = ("-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist")
# An allocation for each tensor, so that a step outside is seen; calls that PyTorch makes in vain are not ours.
SANITIZER = ("--report-api-errors", "no", "--error-exitcode", "9")
# Sections rather than metrics, whose names differ between chips; the clocks stay as they are.
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats")
EVERY_OP = "tests/support/every_op.py"


class Stage(NamedTuple):
    """A Python command line (what stands behind `python3`), the seconds it may take, and a tool that it runs under."""

    name: str
    seconds: int
    command: tuple[str, ...]
    under: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    needs_gpu: bool = True


def tests(name: str, seconds: int, *arguments: str) -> Stage:
    return Stage(name, seconds, (*PYTEST, "--maxfail", "50", *arguments))


def measure(name: str, seconds: int, *nodes: str) -> Stage:
    return Stage(name, seconds, (*PYTEST, *(f"benchmarks/bench_{node}" for node in nodes)), needs_gpu=False)


def sanitizer(tool: str, seconds: int, *arguments: str) -> Stage:
    under = ("compute-sanitizer", "--tool", tool, *SANITIZER)
    return Stage(tool, seconds, (EVERY_OP, *arguments), under, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),))


def attention(*cases: str) -> list[str]:
    return [f"tree_attention.py::test_{case}" for case in cases]


BUILD = Stage("build", 80, ("benchmarks/gpu.py", "--build"), needs_gpu=False)
PROFILE = ("ncu", "--profile-from-start", "off", "--nvtx", "--clock-control", "none", "--csv", "--log-file", "ncu.csv")
GRIDS = ("layers", "fp8", "forest", "prefill", "length", "reward_model", "search", "tree")
QUICK = (EVERY_OP, "--check", "--dtype", "bfloat16", "--backend")

PARTS: dict[str, tuple[Stage, ...]] = {
    "first": (
        BUILD,
        Stage("doctor", 12, ("-m", "saffron.cli", "doctor"), needs_gpu=False),
        Stage("cuda", 18, (*QUICK, "cuda")),
        Stage("triton", 40, (*QUICK, "triton")),
        tests(
            "captured",
            30,
            "tests/search/test_captured.py::test_captured_on_a_gpu",
            "tests/kernels/test_triton_gpu.py::test_a_graph_serves_a_whole_search",
            "tests/kernels/test_cuda_gpu.py",
        ),
        measure(
            "attention", 32, *attention(*(f"search[32-{p}-bf16]" for p in (512, 4096, 32768)), "forest[32-bf16]")
        ),
        measure("choice", 20, "nucleus.py::test_nucleus[peaked-32-bf16]", "multifurcate.py::test_multifurcate"),
        measure("pages", 12, "small_ops.py::test_block_plan"),
        measure("step", 36, "step.py::test_decode_step[512]"),
    ),
    "second": (
        BUILD,
        measure("ops", 35, "small_ops.py", "nucleus.py", "multifurcate.py"),
        measure("attentions", 80, *attention(*GRIDS)),
        measure("steps", 35, "step.py::test_decode_step[4096]", "search.py"),
        sanitizer("memcheck", 30, "--backend", "cuda", "--dtype", "bfloat16"),
        Stage("profile", 25, ("benchmarks/flagship.py",), (*PROFILE, *(x for s in SECTIONS for x in ("--section", s)))),
    ),
}  # fmt: skip
REPORTS = (
    Stage("table", 5, ("benchmarks/report.py", "--no-curves"), needs_gpu=False),
    Stage("decide", 4, ("benchmarks/decide.py",), needs_gpu=False),
)
OTHERS = (
    tests("tests", 280, "-m", "gpu", "tests", "--continue-on-collection-errors", "-k", "not test_sanitizer"),
    sanitizer("racecheck", 140),
    sanitizer("synccheck", 140),
    Stage("competitors", 280, ("benchmarks/competitors.py",)),
)  # fmt: skip
STAGES = {stage.name: stage for part in (*PARTS.values(), OTHERS) for stage in part}


def build() -> int:
    """By CMake alone: an installation by pip asks for a recent setuptools and an environment that can be written to."""
    modules = ("saffron_kernels._native", "saffron_kernels._cuda")
    if os.environ.get("SAFFRON_PREBUILT") == "1":
        for name in modules:
            print(f"prebuilt: {importlib.import_module(name).__file__}")
        return 0
    found = {name: shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}") for name in ("cmake", "nvcc")}
    if missing := [name for name, path in found.items() if path is None]:
        print(f"not found: {', '.join(missing)}")
        return 1
    where = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
    if where.returncode:
        print("not found: pybind11")
        return 1
    options = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": where.stdout.strip(),
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": ROOT / "saffron_kernels",
        "SAFFRON_CUDA": "on",
        "SAFFRON_CUDA_ARCHS": os.environ.get("SAFFRON_CUDA_ARCHS", ""),
        "CMAKE_CUDA_COMPILER": found["nvcc"],
    }
    cmake, folder = str(found["cmake"]), ROOT / "build" / "gpu"
    configure = [cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, *(f"-D{name}={x}" for name, x in options.items())]
    for command in (configure, [cmake, "--build", folder], [sys.executable, "-c", f"import {', '.join(modules)}"]):
        if status := subprocess.run(command, cwd=ROOT).returncode:
            return status
    return 0


def about() -> str:
    """GPU, versions, commit, on one line."""
    asked = {
        "GPU": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
        "commit": ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        "nvcc": [shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version"],
    }
    said = {"commit": os.environ.get("SAFFRON_COMMIT", "unknown")}
    for name, command in asked.items():
        try:
            text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            said.setdefault(name, "none")
        else:
            said[name] = next((x for x in text.splitlines() if name != "nvcc" or "release" in x), "none").strip()
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "triton", "transformers"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return f"GPU {said['GPU']}; {', '.join(versions)}; {said['nvcc']}; commit {said['commit']}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group, so that what a tool has started ends as well."""
    for number, seconds in GRACE:
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass


class Run:
    """Stages in turn, by a common clock, into one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.about = folder, about()
        self.end = time.monotonic()
        self.failed: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.say(self.about)

    def say(self, line: str) -> None:
        print(line, flush=True)
        with (self.folder / "summary.txt").open("a") as file:
            file.write(line + "\n")

    def stage(self, stage: Stage, why_not: str | None) -> None:
        self.end += stage.seconds
        if why_not:
            self.say(f"{stage.name:<11} not run: {why_not}")
            return
        started = time.monotonic()
        with (self.folder / "log.txt").open("a+b") as log:
            log.write(f"\n===== {stage.name}: {' '.join(stage.command)} ({self.about})\n".encode())
            log.flush()
            begin = log.tell()
            status = self.execute(stage, log.fileno())
            log.seek(begin)
            lines = log.read().decode(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "")
        if status != "ok":
            self.failed.append(stage.name)
        self.say(f"{stage.name:<11} {status:<12} {time.monotonic() - started:4.0f} s   {said[:100]}")

    def execute(self, stage: Stage, output: int) -> str:
        """The command until its time is over; a SIGINT that this process ignores is not ignored by its stages."""
        here = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
        environment = {
            **os.environ, "PYTHONPATH": here, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "SAFFRON_RESULTS": str(self.folder / "results.csv"), **dict(stage.environment),
        }  # fmt: skip
        under = [str(self.folder / x) if x == "ncu.csv" else tool(x) or x for x in stage.under]
        process = subprocess.Popen(
            [*under, sys.executable, *stage.command], cwd=ROOT, env=environment, stdout=output, stderr=output,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            status = process.wait(max(1.0, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            stop(process)
            return "out of time"
        except BaseException:
            stop(process)
            raise
        return "ok" if status == 0 else f"exit {status}"

    def sign(self) -> None:
        """GPU, versions and commit at the head of each file that does not say them."""
        for name in ("left-out.txt", "table.md", "decisions.md", "ncu.csv"):
            file = self.folder / name
            if file.exists() and self.about not in (text := file.read_text()):
                file.write_text(f"{self.about}\n\n{text}")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; options are no programs."""
    return None if name.startswith("-") else shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


def has_gpu() -> bool:
    asked = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(asked, capture_output=True).returncode == 0


def chosen(names: Sequence[str]) -> list[Stage]:
    """Of parts and stages by name, in the order given."""
    stages: list[Stage] = []
    for name in names:
        if name not in PARTS and name not in STAGES:
            sys.exit(f"no stage {name}; there are: {' '.join((*PARTS, *STAGES))}")
        stages += PARTS.get(name) or (STAGES[name],)
    return stages


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--build"]:
        return build()
    if len(arguments) < 2 or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    stages = chosen(arguments[1:])
    try:
        run = Run(Path(arguments[0]).resolve())
    except OSError as error:
        sys.exit(f"FOLDER: {error}")
    gpu = has_gpu()
    for stage in (*stages, *REPORTS):
        reason = "no GPU" if stage.needs_gpu and not gpu else None
        if stage.under and not tool(stage.under[0]):
            reason = f"{stage.under[0]} is not installed"
        if stage in REPORTS and not (run.folder / "results.csv").exists():
            reason = "nothing was measured"
        run.stage(stage, reason)
    run.sign()
    run.say(f"first that failed: {run.failed[0]}; of all: {', '.join(run.failed)}" if run.failed else "none failed")
    for name in ("table.md", "decisions.md"):
        if (file := run.folder / name).exists():
            print(file.read_text())
    return bool(run.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
