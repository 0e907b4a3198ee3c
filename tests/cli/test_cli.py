"""The command line: what a person runs, and what they see when something is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from saffron.cli import main

PROMPT = "How do I make bread in my shed?"
FAST = ["--width", "2", "--max-new-tokens", "6", "--min-new-tokens", "2"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(arguments)
    except SystemExit as stopped:  # argparse
        status = int(stopped.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_generate_text_json_and_stream_agree(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, text, _ = run(capsys, "generate", "--prompt", PROMPT, *FAST)
    assert status == 0 and text.strip()
    status, out, _ = run(
        capsys, "generate", "--prompt", PROMPT, *FAST, "--json", "--trace", str(tmp_path / "trace.jsonl")
    )
    record = json.loads(out)
    assert status == 0 and record["text"] == text[:-1] and len(record["token_ids"]) <= 6
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == len(record["steps"]) + 1
    status, out, _ = run(capsys, "generate", "--prompt", PROMPT, *FAST, "--stream")
    assert status == 0 and out == text


def test_generate_many_prompts_and_resume(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": PROMPT}, {"prompt": PROMPT, "prefill": "Sure, you can"}, {"prompt": "How do I fix a clock?"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["generate", "--prompts", str(prompts), "--output", str(output), "--batch", "2", *FAST]
    assert run(capsys, *arguments)[0] == 0
    whole = output.read_text().splitlines()
    assert json.loads(whole[0])["saffron"] == "generate"
    ids = [json.loads(line)["id"] for line in whole[1:]]
    assert len(set(ids)) == 3 and json.loads(whole[2])["prefill"] == "Sure, you can"

    assert run(capsys, *arguments)[0] == 0  # nothing left to do
    assert output.read_text().splitlines() == whole
    for kept in (1, 2, 3):  # killed while writing another line: in the middle of a batch, or between two
        output.write_text("\n".join([*whole[:kept], whole[kept][:40]]))
        assert run(capsys, *arguments)[0] == 0
        assert without_times(output) == [timeless(json.loads(line)) for line in whole]


def timeless(record: dict) -> dict:
    if "cost" in record:
        del record["cost"]["seconds"]
    return record


def without_times(file: Path) -> list[dict]:
    return [timeless(json.loads(line)) for line in file.read_text().splitlines()]


def test_answers_are_known_by_what_was_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    arguments = ["generate", "--prompts", str(prompts), "--output", str(output), *FAST]
    prompts.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    assert run(capsys, *arguments)[0] == 0
    before = output.read_bytes()
    # A line is inserted at the top; U+2028 and U+0085 break no line; a byte order mark is no fault.
    first = json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False)
    prompts.write_text(f"\ufeff{first}\n{json.dumps({'prompt': PROMPT})}\n", encoding="utf-8")
    assert run(capsys, *arguments)[0] == 0
    assert output.read_bytes().startswith(before)
    assert [record["prompt"] for record in without_times(output)[1:]] == [PROMPT, "a\u2028b\u0085c"]
    status, out, _ = run(capsys, "generate", "--prompt", PROMPT, "--output", str(output), *FAST)
    assert status == 0 and out.strip() == without_times(output)[1]["text"].strip()  # no duplicate, and the answer
    assert len(without_times(output)) == 3
    prompts.write_text(f"{json.dumps({'prompt': PROMPT})}\n" * 2)  # as many answers as lines
    assert run(capsys, *arguments)[0] == 0
    assert len({record.get("id") for record in without_times(output)}) == 4


def test_other_options_do_not_mix(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ["generate", "--prompt", PROMPT, "--output", str(output)]
    assert run(capsys, *arguments, *FAST)[0] == 0
    before = output.read_bytes()
    status, _, err = run(capsys, *arguments, *FAST, "--top-p", "0.7")
    assert status == 2 and "top_p was 0.8 and is now 0.7" in err and err.count("\n") == 1
    assert output.read_bytes() == before


def test_one_prompt_that_is_too_long_does_not_stop_the_others(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": PROMPT}, {"prompt": "a clock " * 2000}, {"prompt": "How do I fix a clock?"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    status, _, err = run(capsys, "generate", "--prompts", str(prompts), "--output", str(output), *FAST)
    records = without_times(output)[1:]
    assert status == 0 and [bool(r.get("text")) for r in records] == [True, False, True]
    assert "exceed the context" in records[1]["error"] and f"{prompts}: line 2: skipped" in err


def test_where_the_time_goes(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, "generate", "--prompt", PROMPT, *FAST)
    found = re.fullmatch(
        r"(\d+) tokens in ([\d.]+) s, ([\d.]+) tokens/s, width 2; policy (\d+)%, MRM (\d+)%, selection (\d+)%\n", err
    )
    assert found and 2 <= int(found[1]) <= 6
    assert 99 <= sum(int(share) for share in found.groups()[3:]) <= 101 and all(int(n) for n in found.groups()[3:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--width", "0"], "width: got 0, expected a whole number of at least 1"),
        (["--prompt", "x", "--top-p", "1.5"], "top_p: got 1.5"),
        (["--prompt", "x", "--ranking", "best"], "--ranking: invalid choice: 'best' (choose from"),
        (["--prompt", "x", "--policy", "/no/such/place"], "--policy: '/no/such/place': there is no such folder"),
        (["--prompt", "x", "--mrm", "/no/such/place"], "--mrm: '/no/such/place': there is no such folder"),
        (["--prompt", "a clock " * 2000], "exceed the context"),
        (["--prompt", ""], "prompt: got ''"),
        (["--prompts", "/no/such/file"], "/no/such/file: cannot be read"),
        (["--prompts", "x", "--stream"], "--prompt"),
        (["--prompt", "x", "--batch", "0"], "at least 1"),
        (["--prompt", "x", "--colour"], "unrecognized arguments: --colour"),
        ([], "--prompt"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, "generate", *arguments)
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and message in err and "Traceback" not in err


def test_vocabularies_that_do_not_match(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    tiny.model(attention="eager", vocab_size=9000).save_pretrained(policy)  # no tokenizer, and larger than the MRM's
    status, _, err = run(capsys, "generate", "--prompt", "x", "--policy", str(policy))
    assert status == 2 and err.count("\n") == 1 and "vocabulary" in err


def test_bad_prompt_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for text, message in (
        ("{", "not JSON lines"),
        ("[1]", "JSON object"),
        ('{"promt": "x"}', "line 1: got the key 'promt', which is not known; 'prompt' is"),
        ('{"prompt": "x"}\n{"prompt": "\\ud800"}', "line 2"),
    ):
        file = tmp_path / "prompts.jsonl"
        file.write_text(text)
        status, _, err = run(capsys, "generate", "--prompts", str(file))
        assert status == 2 and message in err


def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    status, out, _ = run(capsys, "demo", "--count", "2", "--width", "4", "--json", "--html", str(page))
    report = json.loads(out)
    assert status == 0 and len(report["prompts"]) == 2
    for row in report["prompts"]:
        assert row["undefended"] and row["saffron"] and isinstance(row["saffron_harmful"], bool)
    assert report["saffron"]["gflop_per_prompt"] > report["undefended"]["gflop_per_prompt"] > 0
    text = page.read_text()
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    answers = [n for n in data["nodes"] if n["answer"]]
    assert [n["step"] for n in answers] == list(range(len(answers))) and len(answers) > 2
    assert any(c["child"] is None for n in data["nodes"] for c in n["candidates"])  # something was pruned
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # self-contained
    status, out, _ = run(capsys, "demo", "--count", "1", "--html", str(page), *FAST)
    assert status == 0 and "attack success rate" in out


def test_parity_reports_and_fails_where_records_differ(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, "parity", str(tmp_path))[0] == 2
    if "SAFFRON_PARITY" not in os.environ:
        pytest.skip("SAFFRON_PARITY names no folder of recorded searches")
    source = Path(os.environ["SAFFRON_PARITY"]) / "a"
    for name in ("policy", "guard", "mrm"):
        (tmp_path / name).symlink_to(source / name)
    case = json.loads((source / "cases.json").read_text())[0]
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    status, out, _ = run(capsys, "parity", str(tmp_path))
    assert status == 0 and "1 of 1 identical" in out
    case["output"][0] += 1
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    status, out, _ = run(capsys, "parity", str(tmp_path), "--json")
    assert status == 1 and json.loads(out)["identical"] is False


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    import saffron_kernels
    from saffron_kernels import backends, ops

    status, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    vllm = report.pop("vllm")
    assert status == 0 and report == saffron_kernels.describe()
    for choices in report["backends"]["cpu"].values():
        assert list(choices) == ops.NAMES
        for choice in choices.values():
            assert {choice["used"], *choice["not"]} == set(backends.MODULES) and all(choice["not"].values())
    status, out, _ = run(capsys, "doctor")
    assert status == 0 and report["native"] in out and "reference" in out and f"vLLM             {vllm}" in out


def test_the_installed_command_starts_quickly_and_helps() -> None:
    help_text = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "saffron.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "generate" in help_text.stdout and "demo" in help_text.stdout
    for heavy in ("transformers", "torch", "numpy", "rich"):  # nothing heavy is imported for a help text
        assert not re.search(rf"\| +{heavy}(\.|$)", help_text.stderr, re.MULTILINE), heavy


def test_reproduce_needs_a_clone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from saffron.cli import reproduce

    monkeypatch.setattr(reproduce, "__file__", str(tmp_path / "lib" / "site-packages" / "saffron" / "cli" / "x.py"))
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "reproduce", "--output", str(tmp_path / "out"))
    assert (status, out) == (2, "") and err.count("\n") == 1 and "from a clone of the repository only" in err
    assert not (tmp_path / "out").exists()


def test_every_option_is_explained() -> None:
    """Help has no "None", no empty line for an option, and one name for what is written."""
    from saffron import cli

    (commands,) = (action for action in cli.parser()._actions if action.dest == "command" or action.choices)
    for name, command in commands.choices.items():
        shown = command.format_help()
        assert "None" not in shown and "==SUPPRESS==" not in shown and "(default )" not in shown, name
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings}"
            assert "--out" not in action.option_strings
            said = command._get_formatter()._expand_help(action)
            if action.option_strings and action.default not in (None, False, True, "", []) and action.nargs != 0:
                assert "default" in said, f"{name} {action.option_strings}: {said}"


def test_an_old_name_still_works(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, "report", str(tmp_path / "none"), "--out", str(tmp_path / "out"))[0] == 2  # of the file alone


def test_negative_numbers_are_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "generate", "--prompt", PROMPT, *FAST, "--unseen-reward", "-1e3")[0] == 0


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "mps", "meta", "foo", "cpu:3", ""])
def test_devices_that_are_not_here(capsys: pytest.CaptureFixture[str], tmp_path: Path, device: str) -> None:
    import torch

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(json.dumps({"prompt": PROMPT, "response": "No."}) + "\n")
    for command in (
        ["generate", "--prompt", "x"],
        ["annotate", str(corpus), "--output", str(tmp_path / "rewards")],
        ["train-mrm", str(tmp_path), "--output", str(tmp_path / "mrm")],
        ["eval-mrm", str(tmp_path)],
        ["eval", "--output", str(tmp_path / "r.jsonl"), "--count", "1"],
    ):
        status, _, err = run(capsys, *command, "--device", device)
        assert status == 2 and err.startswith("saffron: device: got") and err.count("\n") == 1


def test_what_only_a_process_shows(tmp_path: Path) -> None:
    """Arguments that are not UTF-8, a full standard output, a hub that is not asked."""
    command = [sys.executable, "-m", "saffron.cli"]
    broken = subprocess.run([*command, "generate", "--prompt", b"caf\xe9"], capture_output=True)
    assert broken.returncode == 2 and broken.stderr.count(b"\n") == 1 and b"character 4 is not Unicode" in broken.stderr
    odd = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    Path(os.fsdecode(odd)).write_text("{")
    named = subprocess.run([*command, "generate", "--prompts", odd], capture_output=True)
    assert named.returncode == 2 and named.stderr.count(b"\n") == 1 and b"line 1" in named.stderr
    with Path("/dev/full").open("w") as full:
        unsaid = subprocess.run([*command, "doctor"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert unsaid.returncode == 2
    assert unsaid.stderr == "saffron: standard output: cannot be written (No space left on device)\n"
