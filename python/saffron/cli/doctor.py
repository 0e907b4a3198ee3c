"""`saffron doctor`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from saffron.cli.options import Commands


def add(commands: Commands) -> None:
    doctor = commands.add_parser("doctor", help="say what was built, what was found and which kernels will run")
    doctor.add_argument("--json", action="store_true", help="all of it, as JSON")
    doctor.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from saffron.integrations import vllm
    from saffron_kernels import describe

    report = describe() | {"vllm": vllm.describe()}
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    for name, version in {"python": report["python"], **report["versions"]}.items():
        print(f"{name:16} {version or 'not installed'}")
    print(f"{'vLLM':16} {report['vllm']}")
    print(f"{'native module':16} {report['native']} ({report['instruction_set']})")
    for device in ("cpu", "cuda"):
        print(f"\n{device}: {report['devices'].get(device, 'not found')}")
        for dtype, choices in report["backends"][device].items():
            _print_choices(dtype, choices)
    return 0


def _print_choices(dtype: str, choices: dict[str, dict[str, Any]]) -> None:
    """One line for the ops that share a choice, one for each backend that was not chosen."""
    kinds: dict[str, list[str]] = {}
    for op, choice in choices.items():
        kinds.setdefault(json.dumps(choice), []).append(op)
    for kind, ops in kinds.items():
        choice = json.loads(kind)
        which = "all ops" if len(kinds) == 1 else ", ".join(ops)
        print(f"  {dtype:9} {choice['used']}: {which}")
        for name, reason in choice["not"].items():
            print(f"            not {name}: {reason}")
