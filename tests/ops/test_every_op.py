"""The calls that a memory checker runs are good ones, and the backends are asked for what the ops ask for."""

from __future__ import annotations

import every_op
import pytest
import torch

import saffron_kernels
from saffron_kernels import backend, backends, ops, schemas

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", ops.NAMES)
def test_calls(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[torch.dtype]] = []
    chosen = schemas.implementation

    def asking(name: str, device: torch.device, *dtypes: torch.dtype):
        if name == op:
            asked.append(set(dtypes))
        return chosen(name, device, *dtypes)

    monkeypatch.setattr(schemas, "implementation", asking)
    expected = []
    with backend("reference"):
        for arguments in every_op.calls(op, torch.bfloat16, CPU):
            schemas.forget_choices()
            getattr(saffron_kernels, op)(**arguments)
            expected.append(every_op.storage(arguments))
    assert asked == expected and len(asked) >= 1


def test_every_configuration_of_attention() -> None:
    """Tiles of 16, 64 and 128 rows, head sizes of all instances, caches in bf16 and fp8."""
    found = list(every_op.calls("tree_attention", torch.bfloat16, CPU))
    rows = {len(a["q"]) * a["q"].shape[1] // a["k_cache"].shape[1] for a in found}  # type: ignore[arg-type, attr-defined]
    assert any(r <= 16 for r in rows) and any(16 < r <= 64 for r in rows) and any(r > 128 for r in rows)
    assert {a["q"].shape[2] for a in found} >= {64, 128, 256}  # type: ignore[attr-defined]
    assert {a["k_cache"].dtype for a in found} == {torch.bfloat16, every_op.FP8}  # type: ignore[attr-defined]


def test_what_runs_is_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["every_op.py", "--device", "cpu", "--backend", "cpu", "--op", "gather_kv"])
    every_op.main()
    assert capsys.readouterr().out == "3 calls on cpu\n"  # in bf16, fp16 and fp32


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Compared with the reference; the next op is called all the same."""
    right = saffron_kernels.gather_kv

    def wrong(**arguments: object) -> object:
        k, v = right(**arguments)
        return (k, v) if backends.forced_backend() == "reference" else (k, v + 1)

    monkeypatch.setattr(saffron_kernels, "gather_kv", wrong)
    only = [x for op in ("gather_kv", "select_beam") for x in ("--op", op)]
    monkeypatch.setattr("sys.argv", ["every_op.py", "--device", "cpu", "--backend", "cpu", "--check", *only])
    with pytest.raises(SystemExit) as stopped:
        every_op.main()
    said = capsys.readouterr()
    assert stopped.value.code == 1 and said.err.endswith("wrong: gather_kv on cpu\n") and "calls on cpu" in said.out
