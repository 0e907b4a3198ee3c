"""The writer of results: what is not ours is never touched, what is ours is never lost."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saffron.errors import ConfigError
from saffron.storage.results import Schema, open_results, read_results

SCHEMA = Schema("generate", ("id",), lambda record: "text" in record)
SETTINGS = {"width": 4, "names": ("a", "b")}
RECORDS = [{"id": f"{i:x}", "text": f"answer {i} \u2028\x85"} for i in range(4)]
MARK = b'{"id": "'


def written(file: Path, records: list = RECORDS) -> bytes:
    with open_results(file, SCHEMA, SETTINGS) as results:
        results.append(records)
    return file.read_bytes()


def refused(file: Path, message: str, settings: dict = SETTINGS, **options: object) -> None:
    """The file is refused and stays as it is."""
    before = file.read_bytes() if os.path.isfile(file) else None
    with pytest.raises(ConfigError, match=message), open_results(file, SCHEMA, settings, **options):
        pytest.fail("it was opened")
    if before is not None:
        assert file.read_bytes() == before


def test_records_come_back(tmp_path):
    content = written(tmp_path / "deep" / "er" / "r.jsonl")
    assert content.count(b"\n") == 5
    assert json.loads(content.splitlines()[0]) == {
        "saffron": "generate", "version": 1, "settings": {"width": 4, "names": ["a", "b"]}
    }  # fmt: skip
    assert read_results([tmp_path / "deep" / "er" / "r.jsonl"], SCHEMA) == RECORDS
    assert written(tmp_path / "deep" / "er" / "r.jsonl", [*RECORDS, RECORDS[0]]) == content  # each once


@pytest.mark.parametrize(
    "content",
    [
        b"precious data without newline",
        b"precious data\n",
        b"\n",
        b'{"prompt": "x"}\n',
        b'{"prompt": "x"}',
        b"[1]\n",
        b'{"id": "1", "text": "no manifest"}\n',
        b'{"id": "1", "text": "no manifest"}',
        b'{"saffron": "eval", "version": 1, "settings": {}}\n',
        b'{"saffron": "generate", "version": 2, "settings": {}}\n',
        b"\x00\xff\xfe",
        b"\xef\xbb\xbf{",
        b"[" * 100_000 + b"\n",
    ],
)
def test_what_is_not_ours_is_refused_untouched(tmp_path, content):
    file = tmp_path / "f"
    file.write_bytes(content)
    refused(file, f"{file}: ")


def test_the_command_leaves_precious_data_alone(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"precious data without newline")
    for command in (["generate", "--prompt", "x"], ["eval", "--count", "1", "--method", "greedy"]):
        made = subprocess.run(
            [sys.executable, "-m", "saffron.cli", *command, "--output", str(file)], capture_output=True, text=True
        )
        assert made.returncode == 2 and made.stderr.count("\n") == 1 and f"{file}: holds something else" in made.stderr
        assert file.read_bytes() == b"precious data without newline"


@pytest.mark.parametrize(
    "foreign", [b"precious", b"{", b'{"id": 1', b'{"id": 1}\n', b'{"id": "9"}\n', b"\n", b"{}\n", b"x\n"]
)
def test_what_was_added_by_others_is_refused_untouched(tmp_path, foreign):
    file = tmp_path / "r.jsonl"
    content = written(file)
    file.write_bytes(content + foreign)
    if MARK.startswith(foreign):  # as an interruption leaves it
        assert written(file) == content
    else:
        refused(file, f"{file}: ")


@given(st.integers(0, 400), st.binary(max_size=3))
def test_only_torn_ends_of_ours_are_taken_off(tmp_path_factory, cut, added):
    folder = tmp_path_factory.mktemp("torn")
    whole = written(folder / "whole")
    torn = whole[: min(cut, len(whole))] + added
    (folder / "r").write_bytes(torn)
    try:
        found = written(folder / "r")
    except ConfigError:
        assert (folder / "r").read_bytes() == torn
        assert added  # without foreign bytes nothing is refused
    else:
        kept = torn[: torn.rfind(b"\n") + 1]
        assert found.startswith(kept)
        tail = torn[len(kept) :]
        assert tail.startswith(MARK) or MARK.startswith(tail) or whole.startswith(tail) or tail == torn
        assert sorted(found.splitlines()) == sorted(whole.splitlines())


def test_other_settings_are_named(tmp_path):
    written(tmp_path / "r")
    refused(tmp_path / "r", "width was 4 and is now 5", {**SETTINGS, "width": 5})
    with open_results(tmp_path / "none", SCHEMA, SETTINGS):
        pass  # nothing was written but the manifest: other settings lose nothing
    with open_results(tmp_path / "none", SCHEMA, {"width": 5}) as results:
        results.append(RECORDS)
    refused(tmp_path / "none", "width was 5 and is now 4")


def test_a_result_twice_is_refused(tmp_path):
    content = written(tmp_path / "r")
    (tmp_path / "r").write_bytes(content + content.splitlines(keepends=True)[-1])
    refused(tmp_path / "r", "holds a result twice")


def test_places_that_hold_no_results(tmp_path):
    refused(tmp_path, "is a folder")
    refused(Path("/dev/full"), "is a device")
    refused(Path("/dev/null"), "is a device")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is a pipe")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file" / "r", "cannot be written")
    refused(tmp_path / ("x" * 300), "cannot be written")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("")
    refused(prompts, "is what is read", inputs=[prompts])
    (tmp_path / "link").symlink_to(prompts)
    os.link(prompts, tmp_path / "hard")
    for other in ("link", "hard"):
        refused(tmp_path / other, "is what is read", inputs=[prompts])


def test_links_lead_to_the_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "r")
    assert written(tmp_path / "link") == (tmp_path / "r").read_bytes() and (tmp_path / "link").is_symlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_permissions(tmp_path):
    written(tmp_path / "r")
    (tmp_path / "r").chmod(0o444)
    refused(tmp_path / "r", "Permission denied")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    content, write = written(tmp_path / "r", RECORDS[:2]), os.write
    room = 10

    def full(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part, room = data[:room], 0
        return write(descriptor, part)

    with open_results(tmp_path / "r", SCHEMA, SETTINGS) as results:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(ConfigError, match=r"r: cannot be written \(No space left on device\)"):
            results.append(RECORDS)
        assert (tmp_path / "r").read_bytes() == content
        monkeypatch.undo()
        results.append(RECORDS)  # what could not be written is not thought to be there
    assert read_results([tmp_path / "r"], SCHEMA) == RECORDS


def _write_all(file: Path, start: multiprocessing.Event, done: multiprocessing.Queue) -> None:
    start.wait()
    try:
        with open_results(file, SCHEMA, SETTINGS) as results:
            for record in RECORDS * 20:
                results.append([record])
        done.put("wrote")
    except ConfigError as error:
        done.put(str(error))


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    start, done = context.Event(), context.Queue()
    processes = [context.Process(target=_write_all, args=(tmp_path / "r", start, done)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    said = [done.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert "wrote" in said and all(text == "wrote" or "another process is writing there" in text for text in said)
    assert read_results([tmp_path / "r"], SCHEMA) == RECORDS
