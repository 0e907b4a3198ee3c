"""JSON as it is found, paths as they are given, and what a message says of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import threading
from pathlib import Path

import pytest

from saffron.errors import CheckpointError, ConfigError, MissingDependencyError, SaffronError, outside, reason, shown
from saffron.storage.folders import checkpoint_fingerprint, locked, write_atomically
from saffron.storage.paths import check_checkpoint, check_output_file, check_output_folder
from saffron.storage.text import check_text, read_json, read_json_lines


def errors_of_ours(kind=SaffronError):
    return [kind, *(inner for sub in kind.__subclasses__() for inner in errors_of_ours(sub))]


def test_lines_end_at_newlines_alone(tmp_path):
    values = [{"a": "x\u2028y\x85z\x0b\x0c\x1c"}, [1], "é"]
    text = "\r\n\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    (tmp_path / "f").write_text("\ufeff" + text, encoding="utf-8", newline="")
    assert list(read_json_lines(tmp_path / "f")) == [(1, values[0]), (3, values[1]), (5, values[2])]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "line 2 .*delimiter|line 2 .*property name"),
        (b'"\\ud800"', "line 2 .*surrogates"),
        (b'"\\uDfff"', "line 2 .*surrogates"),
        (b'"\xff"', "line 2 .*decode"),
        (b"[" * 100_000, "line 2 .*nested too deeply"),
        (b"1" * 5000, "line 2 .*digits"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, why):
    (tmp_path / "f").write_bytes(b"{}\n" + content)
    with pytest.raises(ConfigError, match=why) as found:
        list(read_json_lines(tmp_path / "f"))
    assert len(str(found.value)) < 600 and "\n" not in str(found.value)


def test_pairs_of_surrogates_are_characters(tmp_path):
    (tmp_path / "f").write_bytes(b'"\\ud83d\\ude00"')
    assert list(read_json_lines(tmp_path / "f")) == [(1, "😀")]


def test_files_that_cannot_be_read(tmp_path):
    for file in (tmp_path, tmp_path / "none", Path("/dev/zero"), tmp_path / "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read"):
            list(read_json_lines(file))
    (tmp_path / "f").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        read_json(tmp_path / "f")


def test_reasons_are_short_and_without_advice():
    assert reason(FileNotFoundError(2, "No such file or directory", "f")) == "No such file or directory"
    assert reason(RecursionError("maximum recursion depth exceeded")) == "nested too deeply"
    assert reason(KeyError("a")) == "'a' is missing"
    assert reason(ValueError("\n \nfirst\nsecond")) == "first"
    assert reason(ValueError()) == "ValueError"
    assert len(reason(ValueError("x" * 9999))) <= 240 and len(shown("x" * 9999)) <= 80
    torch_says = (
        "Weights only load failed. In PyTorch 2.6, we changed the default value of the `weights_only` argument. "
        "Re-running `torch.load` with `weights_only` set to `False` will likely succeed."
    )
    assert reason(RuntimeError(torch_says)) == "Weights only load failed."
    hub_says = (
        "x is not a local folder. If this is a private repository, make sure to pass a token with `hf auth login`"
    )
    assert reason(OSError(hub_says)) == "x is not a local folder."
    numpy_says = "This file contains pickled data. If you trust it you can load it unsafely using `allow_pickle=`."
    assert reason(ValueError(numpy_says)) == "This file contains pickled data."
    with pytest.raises(CheckpointError, match=r"^file \(bad\)$"), outside("file", CheckpointError):
        raise ZeroDivisionError("bad")
    with pytest.raises(ConfigError, match="^own$"), outside("file", CheckpointError):
        raise ConfigError("own")


@pytest.mark.parametrize("kind", errors_of_ours())
def test_errors_cross_processes(kind):
    error = kind("library", "extra") if kind is MissingDependencyError else kind("what is wrong")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error)


def test_text_is_unicode():
    assert check_text("x", "é😀\u2028") == "é😀\u2028"
    with pytest.raises(ConfigError, match="--prompt: character 2 is not Unicode"):
        check_text("--prompt", "a\udcff")


def test_what_looks_like_a_path_is_not_looked_for_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").write_text("x")
    for text in ("/no/such", "./x", "../x", "~/x", "a/b/c", "models/polcy", "x/", "a b", "file", "", ".hidden", "a\0b"):
        with pytest.raises(CheckpointError, match="^--policy: "):
            check_checkpoint("--policy", text)
    for text in ("models", str(tmp_path), "gpt2", "meta-llama/Llama-Guard-3-1B", None):
        check_checkpoint("--policy", text)


def test_output_paths(tmp_path):
    file = tmp_path / "f"
    check_output_file("--trace", file)
    check_output_folder("--output", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())  # they are looked at, not made
    file.write_text("x")
    for bad in (
        tmp_path,
        Path("/dev/null"),
        file / "x",
        tmp_path / "none" / "x",
        tmp_path / "a\0b",
        tmp_path / ("x" * 300),
    ):
        with pytest.raises(ConfigError, match="^--trace: "):
            check_output_file("--trace", bad)
    for bad in (file, file / "x", Path("/dev/null")):
        with pytest.raises(ConfigError, match="^--output: "):
            check_output_folder("--output", bad)


def test_files_are_whole_or_as_they_were(tmp_path, monkeypatch):
    file = tmp_path / "f"
    (tmp_path / "link").symlink_to(file)
    write_atomically(tmp_path / "link", b"one")
    assert file.read_bytes() == b"one" and (tmp_path / "link").is_symlink()
    with pytest.raises(ConfigError, match="is a device"):
        write_atomically(Path("/dev/null"), b"x")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match=r"f: cannot be written \(No space left on device\)"):
        write_atomically(file, b"two")
    assert file.read_bytes() == b"one" and sorted(f.name for f in tmp_path.iterdir()) == ["f", "link"]


def test_a_folder_is_cleared_of_our_leftovers_alone(tmp_path):
    for name in (".saffron-shard.tmp", ".other.tmp", "precious.tmp"):
        (tmp_path / name).write_text("x")
    with locked(tmp_path):
        assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", ".other.tmp", "precious.tmp"]


def test_a_lock_destroys_nothing(tmp_path):
    precious = tmp_path / "precious"
    for make in (lambda lock: lock.write_text("kept"), lambda lock: lock.symlink_to(precious)):
        precious.write_text("kept")
        folder = tmp_path / f"folder-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        make(folder / ".lock")
        with locked(folder):
            pass
        assert (folder / ".lock").read_text() == precious.read_text() == "kept"
    for name, make in (("a pipe", os.mkfifo), ("a folder", os.mkdir)):
        folder = tmp_path / name
        folder.mkdir()
        make(folder / ".lock")
        with pytest.raises(ConfigError, match=f".lock: is {name}, expected an ordinary file"), locked(folder):
            pytest.fail("it is held")


def _write_often(file, letter):
    for _ in range(200):
        write_atomically(file, letter * 100_000)


def test_two_processes_write_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    file = tmp_path / "f"
    write_atomically(file, b"a" * 100_000)
    processes = [context.Process(target=_write_often, args=(file, letter)) for letter in (b"a", b"b", b"c")]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        content = file.read_bytes()
        assert len(content) == 100_000 and len(set(content)) == 1
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [file]


def test_a_planted_link_leads_nowhere(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for name in (f".saffron-{os.getpid()}-{threading.get_ident()}.tmp", ".saffron-f.tmp"):
        (tmp_path / name).symlink_to(precious)
    write_atomically(tmp_path / "f", b"x")
    assert precious.read_text() == "kept" and (tmp_path / "f").read_bytes() == b"x"


def test_fingerprints_change_with_content(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "odd.json").mkdir()
    before = checkpoint_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert checkpoint_fingerprint(tmp_path) != before
    (tmp_path / "x.json").symlink_to(tmp_path / "nowhere")
    assert checkpoint_fingerprint(tmp_path)
