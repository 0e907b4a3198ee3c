"""Whatever a person gives the command line, they get an answer or one line that says what is wrong; no traceback.

Every case calls `main` in this process. The bundled models are loaded once, so that thousands of cases take a minute.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")

from saffron import cli
from saffron.models.bundled import FOLDER
from saffron.models.guard import ProcessRewardModel
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel

FAST = ["--width", "1", "--max-new-tokens", "1", "--min-new-tokens", "0"]
SAID = {
    "prompt": "How do I fix a clock?",
    "response": "Sure, first take",
    "target": "Sure, first take the",
    "prefill": "",
}
VALUES = [
    "", "0", "-1e3", str(10**30), "9" * 5000, "nan", "-inf", "²", "a\0b", "\udcff", "\ud800x", "\n\u2028\x1b[31m",
    "/dev/full", "/proc/no/such", ".", "%s %(default)s", "x" * 300,
]  # fmt: skip
MORE = {"eval": ["wrap:", "model:", "saffron:width=" + "9" * 30, "best-of-n:n=0"], "generate": ["meta", "0x10", "１２"]}
LINES, ANNOTATIONS, CHECKPOINTS = 40, 30, 40  # mutated files of each kind
SLOW = {"--ray", "--help", "--workers"}  # they look for a cluster or start processes
JUNK = [
    None, True, 0, -1, 1.5, 10**30, float("nan"), float("inf"), "", "\ud800", "a\0b", "\u2028", "x" * 3000, [],
    {}, [[]], [None], {"a": []}, ["user"], [0, -1], [10**30],
]  # fmt: skip


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with the end of a command, None if it ended as it should."""
    try:
        status = cli.main(arguments)
    except SystemExit as stopped:  # argparse
        status = stopped.code
    except BaseException as error:
        capsys.readouterr()
        return f"{[a[:60] for a in arguments]}: {type(error).__name__}: {str(error)[:300]}"
    out, err = capsys.readouterr()
    if status == 2:
        line = err.strip("\n").rpartition("\r")[2]
        if "\n" in line or not line.isprintable() or ": " not in line or len(line) > 1500:
            return f"{[a[:60] for a in arguments]}: said {err[:400]!r}"
    elif status not in (0, 1):
        return f"{[a[:60] for a in arguments]}: status {status}, {err[-300:]!r}"
    return None


def check(cases: Iterator[list[str]], capsys: pytest.CaptureFixture[str]) -> int:
    """Runs all; returns how many."""
    found = [run(arguments, capsys) for arguments in cases]
    wrong = [one for one in found if one is not None]
    assert not wrong, f"{len(wrong)} of {len(found)}:\n" + "\n".join(wrong[:40])
    return len(found)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread, no network, the bundled models from memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "parser", functools.cache(cli.parser))  # building it takes longer than most cases
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("reproduce.write_up.reproduce", lambda *_: Path("page"))  # it takes hours
        patch.setattr("saffron.conservative.experiment.run", lambda *_: [])  # minutes
        patch.setattr("saffron.serving.run.Server.run", lambda _: None)  # until it is stopped
        for kind in (Policy, MultifurcationRewardModel, ProcessRewardModel):
            patch.setattr(kind, "from_pretrained", _remembered(kind.from_pretrained))
        yield
    torch.set_num_threads(threads)


def _remembered(load: Callable) -> Callable:
    known = functools.cache(load)

    def from_pretrained(path: str | Path, **options: object) -> object:
        bundled = Path(path).is_relative_to(FOLDER) and not options.get("base")
        return known(path, **options) if bundled else load(path, **options)

    return from_pretrained


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good input for every command."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "lines.jsonl").write_text(json.dumps(SAID) + "\n")
    assert cli.main(["annotate", str(folder / "lines.jsonl"), "--output", str(folder / "rewards")]) == 0
    evaluation = ["--count", "1", "--method", "greedy:max_new_tokens=1", "--attack", "none", "--judge", "oracle"]
    assert cli.main(["eval", *evaluation, "--output", str(folder / "results.jsonl")]) == 0
    (folder / "cases.json").write_text("[]")
    return folder


def commands(files: Path, out: Path) -> dict[str, list[str]]:
    """Arguments that are right, or wrong in what is looked at last."""
    return {
        "demo": ["--count", "1", "--html", str(out / "page.html"), *FAST],
        "generate": ["--prompt", "Hi", *FAST],
        "parity": [str(files)],
        "doctor": [],
        "annotate": [str(files / "lines.jsonl"), "--output", str(out / "rewards")],
        "train-mrm": [str(files / "rewards"), "--output", str(out / "mrm"), "--batch", "50"],  # more than there are
        "eval-mrm": [str(files / "rewards")],
        "eval": ["--output", str(out / "results.jsonl"), "--count", "1", "--method", "greedy:max_new_tokens=1",
                 "--attack", "none", "--judge", "oracle"],
        "report": [str(files / "results.jsonl"), "--output", str(out / "report")],
        "reproduce": ["--output", str(out / "reproduce"), "--quick"],
        "collect": [str(files / "lines.jsonl"), "--output", str(out / "corpus"), "--max-new-tokens", "1"],
        "stepmix": ["--output", str(out / "stepmix"), "--quick"],
        "serve": ["--quiet"],
    }  # fmt: skip


def options_of(command: str) -> list[str]:
    """Every option of a command, and "" for its positional arguments."""
    (subparsers,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = subparsers.choices[command]._actions
    return [a.option_strings[0] if a.option_strings else "" for a in actions if a.nargs != 0]


def bad_values(command: str) -> Iterator[tuple[str, str]]:
    """(option, value); of the many numbers that training takes each gets every second value."""
    for place, option in enumerate(o for o in options_of(command) if o not in SLOW):
        values = VALUES[place % 2 :: 2] if command == "train-mrm" else [*VALUES, *MORE.get(command, [])]
        yield from ((option, value) for value in values)


@pytest.mark.parametrize("command", list(commands(Path(), Path())))
def test_options_with_bad_values(command, files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    given = list(bad_values(command))

    def cases() -> Iterator[list[str]]:
        for number, (option, value) in enumerate(given):
            arguments = commands(files, tmp_path / str(number))[command]
            (tmp_path / str(number)).mkdir()
            if option == "" and value == ".":
                continue  # a folder is looked through by the library of data sets
            if option == "":
                yield [command, value, *arguments[1:]]
            elif option == "--prompts":
                yield [command, option, value, *FAST]
            elif value.startswith("-"):
                yield [command, *arguments, f"{option}={value}"]
            else:
                yield [command, *arguments, option, value]

    assert check(cases(), capsys) >= len(given) - 1


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A file of JSON or of something else with a fault in it."""
    kind = rng.randrange(8)
    if kind == 0:
        return content[: rng.randrange(len(content) + 1)]
    if kind == 1:
        at = rng.randrange(len(content))
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind == 2:
        return rng.choice(
            [b"", b"\n", b"null", b"[]", b"{}", b"7", b'"x"', b"[" * 50_000, b"\xff\xfe", b"\0", b'{"a":' * 9999]
        )
    if kind == 3:
        return rng.choice([b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\x85", b"x"]) + content
    try:
        value = json.loads(content)
    except ValueError:
        return content[: rng.randrange(len(content))] + rng.randbytes(20)
    for _ in range(rng.randrange(1, 3)):
        _mutate(value, rng)
    return json.dumps(value).encode()


def _mutate(value: object, rng: random.Random) -> None:
    """Changes one place of a JSON value."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        inner = value[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            value = inner
            continue
        if rng.random() < 0.25:
            del value[key]
        else:
            value[key] = rng.choice(JUNK)
        return


READERS = {
    "prompts": ["generate", "--prompts", "{}", *FAST],
    "output": ["generate", "--prompt", "Hi", "--output", "{}", *FAST],
    "data": [
        "eval",
        "--data",
        "{}",
        "--method",
        "greedy:max_new_tokens=1",
        "--attack",
        "prefill:2",
        "--output",
        "{}.out",
    ],
    "hex-phi": ["eval", "--data", "harmful-hex-phi={}", "--method", "greedy:max_new_tokens=1", "--output", "{}.out"],
    "corpus": ["annotate", "{}", "--output", "{}.out"],
    "collected": ["collect", "{}", "--output", "{}.out", "--max-new-tokens", "1"],
    "results": ["report", "{}", "--output", "{}.out"],
    "appended": ["eval", "--output", "{}", "--count", "1", "--method", "greedy:max_new_tokens=1", "--judge", "oracle"],
}


@pytest.mark.parametrize("reader", list(READERS))
def test_mutated_lines(reader, files, tmp_path, capsys):
    rng = random.Random(reader)
    messages = [{"role": role, "content": SAID["response"]} for role in ("user", "assistant")]
    good = {
        "hex-phi": json.dumps({"messages": messages}),
        "corpus": json.dumps({"messages": messages}),
        "results": (files / "results.jsonl").read_text().splitlines()[1],
        "appended": (files / "results.jsonl").read_text().splitlines()[1],
    }.get(reader, json.dumps(SAID))

    def cases() -> Iterator[list[str]]:
        for number in range(LINES):
            file = tmp_path / f"{number}.jsonl"
            lines = [mutated(good.encode(), rng) for _ in range(rng.randrange(1, 3))]
            file.write_bytes(b"\n".join(lines) + rng.choice([b"", b"\n", b"\r\n"]))
            yield [argument.replace("{}", str(file)) for argument in READERS[reader]]

    assert check(cases(), capsys) == LINES


def test_mutated_annotations(files, tmp_path, capsys):
    rng = random.Random(1)

    def cases() -> Iterator[list[str]]:
        for number in range(ANNOTATIONS):
            folder = tmp_path / str(number)
            shutil.copytree(files / "rewards", folder)
            file = rng.choice([f for f in folder.iterdir() if f.name != ".lock"])
            file.write_bytes(mutated(file.read_bytes(), rng))
            yield ["eval-mrm", str(folder)]
            yield ["train-mrm", str(folder), "--output", str(folder / "mrm"), "--batch", "50"]

    assert check(cases(), capsys) == 2 * ANNOTATIONS


@pytest.mark.parametrize("model", ["policy", "mrm"])
def test_mutated_checkpoints(model, tmp_path, capsys):
    rng = random.Random(model)

    def cases() -> Iterator[list[str]]:
        for number in range(CHECKPOINTS):
            folder = tmp_path / str(number)
            shutil.copytree(FOLDER / model, folder)
            file = rng.choice(sorted(folder.iterdir()))
            file.write_bytes(mutated(file.read_bytes(), rng))
            base = ["--base", str(FOLDER / "guard")] if model == "mrm" else []
            yield ["generate", "--prompt", "Hi", f"--{model}", str(folder), *base, *FAST]
            shutil.rmtree(folder)

    assert check(cases(), capsys) == CHECKPOINTS


def test_there_are_enough_cases():
    options = sum(len(list(bad_values(command))) for command in commands(Path(), Path()))
    assert options + LINES * len(READERS) + 2 * (ANNOTATIONS + CHECKPOINTS) >= 2000
