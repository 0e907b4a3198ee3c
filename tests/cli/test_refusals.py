"""Options and files that were taken without a word: refused in one line that names them, and nothing is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from saffron.cli import main
from saffron.errors import CheckpointError, ConfigError, outside
from saffron.evaluation.datasets import load_cases
from saffron.models.adapter import merge_adapter
from saffron.models.chat import ConversationEncoder
from saffron.models.loading import load_model
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import parse_method
from saffron.storage.folders import write_replaceable
from saffron.training import plots

Capture = pytest.CaptureFixture[str]


def refused(arguments: list[str], capsys: Capture) -> str:
    """What the command says when it refuses them."""
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse
        status = int(str(stop.code))
    said = capsys.readouterr()
    assert status == 2 and not said.out
    return said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "1e3"], "--width: got '1e3', expected a whole number\n"),
        (
            ["--min-new-tokens", "20", "--max-new-tokens", "10"],
            "min_new_tokens: got 20, expected at most max_new_tokens",
        ),
    ],
)
def test_options(options: list[str], message: str, capsys: Capture) -> None:
    assert message in refused(["generate", "--prompt", "hi", *options], capsys)


def test_a_shorter_answer_than_the_default_minimum_is_no_contradiction() -> None:
    models = tiny.trio()
    parse_method("saffron:max_new_tokens=2", models)
    with pytest.raises(ConfigError, match="min_new_tokens: got 20, expected at most max_new_tokens, 2"):
        parse_method("greedy:max_new_tokens=2,min_new_tokens=20", models)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a", "prefil": "b"}\n', "line 1: got the key 'prefil', which is not known"),
    ],
)
def test_files_of_prompts(content: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    assert message in refused(["generate", "--prompts", str(file)], capsys)
    with pytest.raises(ConfigError, match="holds no prompts|got the key 'targt'"):
        file.write_text(content.replace("prefil", "targt"))
        load_cases(str(file))


@pytest.mark.parametrize("messages", [{"prompt": "a"}, [], ["a", "b"], [{"role": "user", "content": "a"}]])
def test_records_of_published_sets_say_what_is_wrong(messages: object, tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps(messages) + "\n")
    with pytest.raises(
        ConfigError, match=r"line 1 is not of its form \((expected a list of messages|it has \d messages)"
    ):
        load_cases(f"harmful-hex-phi={file}")


@pytest.mark.parametrize("arguments", [["generate", "--prompt", "hi", "--trace"], ["demo", "--html"]])
def test_files_of_others_are_not_overwritten(arguments: list[str], tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "thesis"
    file.write_text("precious")
    assert "holds something else, which is not overwritten" in refused([*arguments, str(file)], capsys)
    assert file.read_text() == "precious"


def test_files_of_ours_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page"
    write_replaceable(file, b"ours 1", b"ours")
    write_replaceable(file, b"ours 2", b"ours")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="cannot be written \\(No space left on device\\)"):
        write_replaceable(file, b"ours 3", b"ours")
    assert file.read_bytes() == b"ours 2" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_pictures_are_known_by_their_title(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"picture.{kind}"
    figure, _ = plots._axes((1, 1))
    plots._save(figure, file)
    assert plots.MARK in file.read_bytes()


def test_stepmix_says_what_its_options_take(capsys: Capture) -> None:
    assert "--output: /dev/null: cannot be made" in refused(["stepmix", "--output", "/dev/null"], capsys)
    with pytest.raises(SystemExit):
        main(["stepmix", "--help"])
    shown = capsys.readouterr().out
    for bare in ("TRIALS", "EPISODES", "SEED", "{paper"):
        assert bare not in shown


def test_errors_of_others_without_their_advice() -> None:
    for raised, said in [
        (ValueError("You set `ignore_mismatched_sizes` to `False`, thus raising an error."), "ValueError"),
        (OSError("We couldn't connect to 'https://huggingface.co' to load the files"), "the hub cannot be reached"),
    ]:
        with pytest.raises(ConfigError) as caught, outside("x"):
            raise raised
        assert str(caught.value) == f"x ({said})"
    with (
        pytest.raises(
            ConfigError, match=r"^x \(Exceeds the limit \(4300 digits\) for integer string conversion[^;]*\)$"
        ),
        outside("x"),
    ):
        json.loads("1" * 5000)


def test_checkpoints(tmp_path: Path) -> None:
    base = tiny.save_checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 60}))
    with pytest.raises(CheckpointError, match=r"of other shapes than .* \[64, 48\] instead of \[60, 48\]"):
        load_model(base)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}')
    with pytest.raises(CheckpointError, match="lora_alpha: got nan, expected a finite number"):
        merge_adapter(None, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="lm_head_bias: holds 3.3e\\+38, expected values of at most 1e\\+30"):
        MultifurcationRewardModel(tiny.model(), bias=torch.full((97,), 3.3e38))


def test_a_template_that_leaves_out_what_the_user_says() -> None:
    tokenizer = tiny.tokenizer()
    for split in (True, False):
        encoder = ConversationEncoder(tokenizer, "policy", split)
        said = [{"role": "user", "content": " what\n</s> 'is' this? "}]
        for template in (
            "Answer: ",
            "{% for m in messages %}{{ m['role'] }}{% endfor %}",
            "{{ messages[0].content[:2] }}",
        ):
            with pytest.raises(ConfigError, match="policy: its chat template does not show what the user says"):
                encoder.chat(said, template)
        for template in ("{{ messages[0].content | trim }}", "{{ messages[0].content | tojson }}"):
            assert encoder.chat(said, template)
