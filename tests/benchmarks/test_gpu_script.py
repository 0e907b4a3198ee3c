"""benchmarks/gpu.sh without a GPU: its parts fit their time, every stage runs on a device that the CPU plays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gpu
import pretend_gpu
import pytest
import rehearsal
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is to run")

REHEARSAL = gpu.ROOT / "tests" / "support" / "rehearsal.py"


def test_every_stage_runs(tmp_path: Path) -> None:
    """All that both parts run on a GPU, in one process, small. FlexAttention looks below what is pretended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    result = subprocess.run(
        [sys.executable, str(REHEARSAL), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stdout + result.stderr
    ran = re.findall(r"^(\w+) \([\d.]+ s\): ok$", result.stdout, re.MULTILINE)
    assert set(ran) == {s.name for part in (*gpu.PARTS.values(), gpu.REPORTS) for s in part} - {"build"}
    assert {line.split(":")[0].split()[0] for line in (tmp_path / "left-out.txt").read_text().splitlines()} <= {
        "FlashInfer", "FlexAttention",
    }  # fmt: skip
    rows = (tmp_path / "results.csv").read_text()
    assert all(f",{op}," in rows for op in ("tree_attention", "nucleus", "multifurcate", "block_plan", "decode_step"))
    assert "cuda backend" in rows and "cuda wgmma" in rows and '""graph"": true' in rows


def test_what_a_stage_comes_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that fails or is skipped, and names that are not there."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # of the tests that this one is among
    for body, good in (("pass", True), ("assert False", False), ("pytest.skip('no')", False)):
        file = tmp_path / f"test_{len(body)}.py"
        file.write_text(f"import pytest\n\ndef test_it():\n    {body}\n")
        assert (rehearsal.execute((*gpu.PYTEST, str(file))) == "ok") is good, body
        assert rehearsal.execute((*gpu.PYTEST, f"{file}::test_other")) != "ok"
    (tmp_path / "script.py").write_text("import sys\nsys.exit(int(sys.argv[1]))\n")
    statuses = [rehearsal.execute((str(tmp_path / "script.py"), status)) for status in "02"]
    assert statuses == ["ok", "exit 2"]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with pretend_gpu.pretended(monkeypatch):
        yield torch.device("cuda")


def test_what_is_pretended(device: torch.device) -> None:
    """Tensors of two devices do not meet; a capture runs nothing, and holds nothing that the host reads."""
    x = torch.zeros(3, device=device)
    assert x.is_cuda and (x + 1).device.type == "cuda" and x.cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
        doubled = x * 2
    assert x.tolist() == [0, 0, 0]
    for count in (1, 2):
        graph.replay()
        assert x.tolist() == [count] * 3 and doubled.tolist() == [2 * count] * 3
    for read in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.nonzero):
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            read(x.sum())


def test_parts_fit_five_minutes() -> None:
    """Within 300 seconds even if every stage has to be ended; what they name is there."""
    end = sum(stage.seconds for stage in gpu.REPORTS) + sum(seconds for _, seconds in gpu.GRACE)
    for name, part in gpu.PARTS.items():
        assert sum(stage.seconds for stage in part) + end <= 315, name
        assert sum(stage.seconds for stage in (*part, *gpu.REPORTS)) <= 300, name
    assert len(gpu.FILES) <= 8
    for stage in gpu.STAGES.values():
        for argument in stage.command:
            if argument.partition("::")[0].endswith(".py"):
                assert (gpu.ROOT / argument.partition("::")[0]).is_file(), argument


SLOW = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('what failed')\n"
DEAF = "import signal, time\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)"


def test_a_stage_out_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is interrupted as by Ctrl-C, also where this process ignores that; the next ones have their own time."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = gpu.Run(tmp_path / "results")
        run.stage(gpu.Stage("bad", 3, ("-c", "raise SystemExit('no such thing')")), None)
        run.end -= 3  # nothing is saved
        run.stage(gpu.Stage("slow", 3, ("-c", SLOW)), None)
        run.stage(gpu.Stage("good", 20, ("-c", "print('fine')")), None)
        run.stage(gpu.Stage("absent", 1, ("-c", "")), "no GPU")
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.failed == ["bad", "slow"]
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert re.search(r"bad +exit 1 .*no such thing", summary) and re.search(r"slow +out of time .*what failed", summary)
    assert re.search(r"good +ok .*fine", summary) and "absent      not run: no GPU" in summary
    assert run.about in summary and run.about in (tmp_path / "results" / "log.txt").read_text()


def test_what_ignores_an_interrupt_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", tuple((number, 0.5) for number, _ in gpu.GRACE))
    run = gpu.Run(tmp_path)
    run.stage(gpu.Stage("deaf", 2, ("-c", DEAF)), None)
    assert run.failed == ["deaf"] and "out of time" in (tmp_path / "summary.txt").read_text()


def test_each_file_says_where_it_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFFRON_COMMIT", "abc")
    run = gpu.Run(tmp_path)
    for _ in range(2):
        (tmp_path / "table.md").write_text("| a |\n")
        run.sign()
        run.sign()
        assert (tmp_path / "table.md").read_text() == f"{run.about}\n\n| a |\n"
    assert f"torch {torch.__version__.split('+')[0]}" in run.about and re.search(r"commit \w+$", run.about)


def test_names_of_stages(tmp_path: Path) -> None:
    """By the shell script, as on a machine with a GPU."""
    script = gpu.ROOT / "benchmarks" / "gpu.sh"
    result = subprocess.run(["bash", str(script), str(tmp_path), "buidl"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("no stage buidl; there are: first second build doctor")
    result = subprocess.run(["bash", str(script), os.devnull + "/none", "doctor"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("FOLDER: ")
    result = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert result.returncode == 2 and "gpu.sh FOLDER first" in result.stdout
    assert [stage.name for stage in gpu.chosen(["doctor", "second"])] == [
        "doctor",
        *(s.name for s in gpu.PARTS["second"]),
    ]


def test_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """CMake is told where the modules go; a module that is brought along is taken as it is."""
    calls = tmp_path / "calls"
    for name in ("cmake", "nvcc"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{calls}\ncase "$*" in *--build*) exit 3;; esac\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    assert gpu.main(["--build"]) == 1 and "not found: pybind11" in capfd.readouterr().out
    (tmp_path / "python").write_text("#!/bin/sh\necho /pybind11/cmake\n")
    assert gpu.main(["--build"]) == 3
    configure, make = calls.read_text().splitlines()
    assert (
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={gpu.ROOT / 'saffron_kernels'}" in configure
        and "SAFFRON_CUDA=on" in configure
    )
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path / 'nvcc'}" in configure and make.startswith("cmake --build")
    monkeypatch.setenv("SAFFRON_PREBUILT", "1")
    monkeypatch.setattr(gpu.importlib, "import_module", lambda name: os)
    assert gpu.main(["--build"]) == 0 and capfd.readouterr().out.count("prebuilt: ") == 2
