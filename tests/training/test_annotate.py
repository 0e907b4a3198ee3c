"""`saffron annotate`: the guard's rewards of every prefix, written so that no end of the process loses any."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")

from saffron import world
from saffron.cli import main
from saffron.errors import CheckpointError, ConfigError, NumericalError
from saffron.models.bundled import FOLDER
from saffron.models.guard import ProcessRewardModel
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.storage.folders import locked
from saffron.training.annotate import AnnotateConfig, Annotator, annotate
from saffron.training.conversations import Conversation, read_corpus
from saffron.training.layout import AGENT, FORMAT, USER, ConversationLayout
from saffron.training.shards import MANIFEST, read_rewards
from saffron.workers import Workers

GUARD = str(FOLDER / "guard")
PROMPT, RESPONSE = "How do I brew vexol at home?", "Sure, first grind the"
RAY = pytest.mark.skipif(
    not (os.environ.get("SAFFRON_TEST_RAY") and importlib.util.find_spec("ray")), reason="SAFFRON_TEST_RAY is not set"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def guard() -> ProcessRewardModel:
    return ProcessRewardModel.from_pretrained(GUARD, device="cpu")


@pytest.fixture(scope="module")
def corpus() -> list[Conversation]:
    rng, requests = random.Random(0), world.requests("forbidden", "train", 1)
    return [Conversation((r.text, world.answers.compliance(r, rng))) for r, _ in zip(requests, range(12), strict=False)]


def write(file: Path, *records: object) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def config(**changes: object) -> AnnotateConfig:
    return AnnotateConfig(**{"max_tokens": 40, "batch": 2, "shard_size": 4, "device": "cpu"} | changes)  # type: ignore[arg-type]


# What the rewards are


def test_rewards_equal_one_call_a_prefix(guard, corpus):
    annotator = Annotator(guard, config(max_tokens=128))
    found = annotator.rewards([annotator.lay_out(conversation) for conversation in corpus[:3]])
    begin, _, end = (guard.encode(piece) for piece in guard.template())
    for conversation, rewards in zip(corpus[:3], found, strict=True):
        prompt, response = (guard.encode(turn) for turn in conversation.turns)
        alone = [guard.score_tokens([begin + prompt[:n] + end]).item() for n in range(1, len(prompt) + 1)]
        alone += [guard.score([(conversation.turns[0], response[:n])]).item() for n in range(1, len(response) + 1)]
        np.testing.assert_allclose(rewards, alone, atol=2e-4)
        assert np.ptp(alone) > 1  # a guard that says the same of everything would pass


def test_one_forward_pass_runs_the_conversation_once(guard, corpus):
    annotator, counts = Annotator(guard, config(prefixes="response", max_tokens=128)), []
    hook = guard.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    layouts = [annotator.lay_out(conversation) for conversation in corpus[:2]]
    annotator.rewards(layouts)
    hook.remove()
    suffixes = sum(len(layout.ends) * len(layout.after) for layout in layouts)
    assert len(counts) == 1
    assert counts[0] <= sum(len(layout.trunk) for layout in layouts) + suffixes


def test_layout_is_what_the_mrm_reads(guard, corpus):
    mrm = MultifurcationRewardModel.from_pretrained(FOLDER / "mrm", base=FOLDER / "guard", device="cpu")
    prompt, response = corpus[0].turns
    layout = ConversationLayout(guard)(corpus[0])
    context, ids, said = mrm.context_tokens(prompt), guard.encode(response), guard.encode(prompt)
    assert layout.input_ids == context + ids
    assert layout.roles[-len(ids) :] == [AGENT] * len(ids)
    assert layout.roles.count(USER) == len(said)
    assert layout.roles.count(FORMAT) == len(context) - len(said)
    assert [layout.input_ids[j] for j in layout.rewarded] == said + ids
    only = ConversationLayout(guard, prefixes="response")(corpus[0])
    assert only.rewarded == list(range(len(context), len(context) + len(ids)))
    assert only.prefixes() == [guard.sequence(prompt, ids[:n]) for n in range(1, len(ids) + 1)]


def test_conversations_of_many_turns(guard):
    turns = ("hello", "good day", "how do I bake bread?", "with flour")
    layout, ids = ConversationLayout(guard)(Conversation(turns)), [guard.encode(turn) for turn in turns]
    pieces = [guard.encode(piece) for piece in guard.template(4)]
    whole = [token for piece, turn in zip(pieces, ids, strict=False) for token in [*piece, *turn]]
    assert layout.prefixes()[-1] == whole + pieces[-1]
    after_two = [*pieces[0], *ids[0], *pieces[1], *ids[1]]
    assert layout.prefixes()[len(ids[0]) + len(ids[1]) - 1] == after_two + pieces[-1]


@pytest.mark.parametrize("most", [2, 9, 12, 20, 31])
def test_cut_at_max_tokens(guard, corpus, most):
    cut, whole = ConversationLayout(guard, most)(corpus[0]), ConversationLayout(guard)(corpus[0])
    assert cut.input_ids == whole.input_ids[: len(cut.input_ids)]
    assert len(cut.input_ids) <= most
    assert len(cut.input_ids) > most - 8  # at most the words before a turn are left out
    assert cut.prefixes() == whole.prefixes()[: len(cut.ends)]


# Corpora


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": PROMPT, "response": RESPONSE}, (PROMPT, RESPONSE)),
        ({"prompt": PROMPT, "response": [5, 6, 7]}, (PROMPT, (5, 6, 7))),
        (
            {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]},
            (PROMPT, RESPONSE),
        ),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, ("a\n\nb",)),
        ({"chosen": f"\n\nHuman: {PROMPT}\n\nAssistant: {RESPONSE}"}, (PROMPT, RESPONSE)),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"}, ("a", "b", "c")),
    ],
)
def test_forms_of_a_corpus(tmp_path, record, turns):
    assert read_corpus(write(tmp_path / "c.jsonl", record)) == [Conversation(turns)]


def test_data_set_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"chosen": f"\n\nHuman: q{n}\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"} for n in range(3)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "split"))
    wanted = [Conversation((f"q{n}", "a")) for n in range(3)]
    assert read_corpus(str(tmp_path / "one")) == wanted
    assert read_corpus(str(tmp_path / "split"), split="test", limit=2) == wanted[:2]
    both = read_corpus(str(tmp_path / "one"), fields=("chosen", "rejected"))
    assert both[:2] == [wanted[0], Conversation(("q", "b"))]
    with pytest.raises(ConfigError, match="no data set with a split 'train'"):
        read_corpus(str(tmp_path / "split"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "response": "b"', "not JSON lines"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}', "line 2 is no conversation .*wizard"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2 is no conversation"),
        ('{"prompt": "a"}', "line 2 is no conversation .*response"),
        ('{"prompt": "a", "response": 5}', "line 2 is no conversation"),
        ('{"prompt": "a", "response": [1, -5]}', "line 2 is no conversation"),
        ('{"chosen": "hello"}', "line 2 is no conversation"),
        ("[1]", "line 2 is no conversation"),
        ('"text"', "line 2 is no conversation"),
        ("7", "line 2 is no conversation"),
    ],
)
def test_bad_records_are_named(tmp_path, line, message):
    file = tmp_path / "c.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_corpus(str(file))


def test_an_empty_corpus_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no conversation"):
        read_corpus(write(tmp_path / "c.jsonl"))


# What is written


def test_shards_hold_the_rewards(guard, corpus, tmp_path):
    seen: list[tuple[int, int]] = []
    annotate(corpus, GUARD, tmp_path, config(), progress=lambda *done: seen.append(done))
    data, annotator = read_rewards(tmp_path), Annotator(guard, config())
    layouts = [annotator.lay_out(conversation) for conversation in corpus]
    assert len(data.rows) == len(corpus)
    for row, layout in zip(data.rows, layouts, strict=True):
        assert row.input_ids.tolist() == layout.input_ids
        assert row.roles.tolist() == layout.roles
        assert np.flatnonzero(~np.isnan(row.rewards)).tolist() == layout.rewarded
        np.testing.assert_allclose(row.rewards[layout.rewarded], annotator.rewards([layout])[0], atol=2e-4)
    assert seen[0] == (0, 0)
    assert np.sum(seen, axis=0).tolist() == [len(corpus), sum(len(layout.ends) for layout in layouts)]


def test_same_bytes_with_two_workers(corpus, tmp_path):
    annotate(corpus, GUARD, tmp_path / "one", config())
    annotate(corpus, GUARD, tmp_path / "two", config(), Workers(2))
    assert len(files(tmp_path / "one")) == 4
    assert files(tmp_path / "one") == files(tmp_path / "two")


@RAY
def test_same_bytes_on_ray(corpus, tmp_path):
    annotate(corpus, GUARD, tmp_path / "here", config())
    annotate(corpus, GUARD, tmp_path / "ray", config(), Workers(2, "local"))
    assert files(tmp_path / "here") == files(tmp_path / "ray")
    with pytest.raises(ConfigError, match="turn 1"):
        annotate([Conversation(("a", (10**6,)))], GUARD, tmp_path / "bad", config(), Workers(2, "local"))


def test_kill_and_resume(corpus, tmp_path):
    many = corpus * 4
    file = write(tmp_path / "c.jsonl", *({"prompt": c.turns[0], "response": c.turns[1]} for c in many))
    options = ["annotate", file, "--shard-size", "1", "--batch", "1", "--device", "cpu", "--max-tokens", "40"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-m", "saffron.cli", *options, "--output", str(killed)])
    end = time.monotonic() + 120
    while not (killed / "shard-00001.parquet").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {name: (killed / name).stat().st_mtime_ns for name in files(killed) if name.startswith("shard")}
    assert 2 <= len(done) < len(many)
    with pytest.raises(CheckpointError, match=r"shards are missing .*the same `saffron annotate` again"):
        read_rewards(killed)
    (killed / ".saffron-shard-00000.parquet.tmp").write_bytes(b"half")  # what a kill inside a write leaves
    assert main([*options, "--output", str(killed)]) == 0
    assert main([*options, "--output", str(whole)]) == 0
    assert files(killed) == files(whole)
    assert {name: (killed / name).stat().st_mtime_ns for name in done} == done  # kept, not made again
    assert len(read_rewards(killed).rows) == len(many)


@pytest.fixture(scope="module")
def annotated(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("annotated")
    annotate(corpus[:2], GUARD, out, config())
    return out


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_tokens": 39}, "settings.max_tokens was 40 and is now 39"),
        ({"batch": 3}, "settings.batch"),
        ({"prefixes": "response"}, "settings.prefixes"),
        ({"dtype": "bfloat16"}, "settings.dtype"),
    ],
)
def test_other_settings_do_not_mix(annotated, corpus, changes, name):
    before = files(annotated)
    with pytest.raises(ConfigError, match=name):
        annotate(corpus[:2], GUARD, annotated, config(**changes))
    assert files(annotated) == before


def test_another_corpus_or_guard_does_not_mix(annotated, corpus, tmp_path):
    before = files(annotated)
    with pytest.raises(ConfigError, match="corpus.fingerprint"):
        annotate(corpus[1:3], GUARD, annotated, config())
    other = tmp_path / "guard"
    other.mkdir()
    for file in Path(GUARD).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    annotate(corpus[:2], str(other), annotated, config())  # the same guard elsewhere
    changed = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (other / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="prm.fingerprint"):
        annotate(corpus[:2], str(other), annotated, config())
    assert files(annotated) == before


def test_two_processes_do_not_write_one_folder(annotated, corpus):
    with locked(annotated), pytest.raises(ConfigError, match="another process"):
        annotate(corpus[:2], GUARD, annotated, config())


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"nonsense"])
def test_damaged_shards_are_named(annotated, tmp_path, damage):
    for name, content in files(annotated).items():
        (tmp_path / name).write_bytes(damage(content) if name.startswith("shard") else content)
    with pytest.raises(CheckpointError, match="shard-00000.parquet: cannot be read"):
        read_rewards(tmp_path)


def test_copied_shards_are_named(corpus, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    annotate(corpus[:4], GUARD, one, config(shard_size=2))
    annotate(corpus[4:8], GUARD, other, config(shard_size=2))
    second = (one / "shard-00001.parquet").read_bytes()
    (one / "shard-00001.parquet").write_bytes((one / "shard-00000.parquet").read_bytes())
    with pytest.raises(CheckpointError, match=r"shard-00001.parquet: its first conversation is number \[0\]"):
        read_rewards(one)
    (one / "shard-00001.parquet").write_bytes((other / "shard-00001.parquet").read_bytes())
    with pytest.raises(CheckpointError, match="shard-00001.parquet: is of another annotation"):
        read_rewards(one)
    (one / "shard-00001.parquet").write_bytes(second)
    assert len(read_rewards(one).rows) == 4


@pytest.mark.parametrize(
    "changes",
    [{"shards": "2"}, {"shards": 0}, {"shards": 10**30}, {"corpus": []}, {"corpus": {"conversations": None}},
     {"prm": {}}, {"prm": {"source": 7}}, {"format": ["x"]}],
)  # fmt: skip
def test_manifests_of_other_types_are_named(annotated, tmp_path, changes):
    for name, content in files(annotated).items():
        (tmp_path / name).write_bytes(content)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | changes))
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: "):
        read_rewards(tmp_path)


def test_folders_of_something_else_are_errors(annotated, corpus, tmp_path):
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_rewards(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": "another"}')
    with pytest.raises(CheckpointError, match="'another'"):
        read_rewards(tmp_path)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / "shard-00000.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="shards without"):
        annotate(corpus[:2], GUARD, tmp_path, config())


def test_bad_arguments(guard, corpus, tmp_path, capsys):
    for name, value in (("batch", 0), ("shard_size", 0), ("dtype", "float3")):
        with pytest.raises(ConfigError, match=name):
            config(**{name: value})
    for changes in ({"max_tokens": 1}, {"prefixes": "some"}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            ConversationLayout(guard, **changes)
    with pytest.raises(CheckpointError, match="no Hugging Face checkpoint"):
        annotate(corpus, str(tmp_path), tmp_path / "out", config())
    with pytest.raises(ConfigError, match="turn 1"):
        ConversationLayout(guard)(Conversation(("a", (10**6,))))
    assert main(["annotate", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "out")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_rewards_that_are_not_numbers(guard, corpus, monkeypatch):
    annotator = Annotator(guard, config())
    monkeypatch.setattr(guard, "score_tokens", lambda sequences: torch.full((len(sequences),), torch.nan))
    with pytest.raises(NumericalError):
        annotator.rewards([annotator.lay_out(corpus[0])])


def test_command_reports_what_it_did(corpus, tmp_path, capsys):
    file = write(tmp_path / "c.jsonl", *({"prompt": c.turns[0], "response": c.turns[1]} for c in corpus[:3]))
    command = ["annotate", file, "--output", str(tmp_path / "out"), "--limit", "2", "--device", "cpu", "--json"]
    rewards = []
    for found in (0, 2):
        assert main(command) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["conversations"], said["found"]) == (2, found)
        rewards.append(said["rewards"])
    rows = read_rewards(tmp_path / "out").rows
    assert rewards == [sum(int((~np.isnan(row.rewards)).sum()) for row in rows), 0]
