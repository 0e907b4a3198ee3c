"""`saffron train-mrm`: partial supervision of the bias and the LoRA factors, resumed where it was killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import model as tiny_model

pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState

from saffron import world
from saffron.cli import main
from saffron.errors import CheckpointError, ConfigError, NumericalError
from saffron.models.bundled import FOLDER
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.training.annotate import AnnotateConfig, annotate
from saffron.training.batches import collate, count, unseen_mask
from saffron.training.conversations import Conversation
from saffron.training.model import TrainableMrm, load_guard
from saffron.training.shards import AnnotatedConversation, RewardData, read_rewards
from saffron.training.train import TrainConfig, Trainer

GUARD = str(FOLDER / "guard")
VOCABULARY = 97


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> Path:
    rng, requests = random.Random(0), world.requests("forbidden", "train", 1)
    corpus = [
        Conversation((r.text, world.answers.compliance(r, rng))) for r, _ in zip(requests, range(12), strict=False)
    ]
    out = tmp_path_factory.mktemp("annotated") / "rewards"
    annotate(corpus, GUARD, out, AnnotateConfig(max_tokens=40, device="cpu"))
    return out


@pytest.fixture(scope="module")
def data(annotated) -> RewardData:
    return read_rewards(annotated)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Trainer:
    trainer = Trainer(GUARD, data, tmp_path_factory.mktemp("trained") / "mrm", config(epochs=2), device="cpu")
    trainer.train()
    return trainer


def config(**changes: object) -> TrainConfig:
    return replace(TrainConfig(batch=3, lr=1e-2, heldout_share=0.2, evaluate_every=3), **changes)


def rows(lengths: tuple[int, ...] = (7, 4, 9)) -> list[AnnotatedConversation]:
    """Conversations over the first half of a vocabulary, some of whose tokens have no reward."""
    rng = np.random.default_rng(0)
    found = []
    for length in lengths:
        rewards = rng.normal(size=length).astype(np.float32)
        rewards[rng.random(length) < 0.3] = np.nan
        rewards[-1] = 1.5
        found.append(AnnotatedConversation(rng.integers(0, VOCABULARY // 2, length), np.ones(length, np.int8), rewards))
    return found


def tiny_mrm() -> TrainableMrm:
    made = TrainableMrm(tiny_model(attention="eager"))
    with torch.no_grad():
        for name, parameter in made.trained().items():
            if "lora_B" in name or name == "bias":
                parameter.normal_()
    return made


def files(folder: Path) -> dict[str, bytes]:
    found = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


# The loss


def test_loss_is_the_papers_sum():
    mrm, batch = tiny_mrm(), collate(rows())
    found = (mrm(batch.ids, batch.next_tokens) - batch.rewards)[batch.counted].square().sum().item()
    causal, wanted = mrm.model.get_base_model(), 0.0
    for row in rows():
        for j in range(1, len(row.input_ids)):
            if not np.isnan(row.rewards[j]):
                with torch.no_grad():  # M(s[0:j]), the whole vector, from a pass over that prefix alone
                    logits = causal(input_ids=torch.from_numpy(row.input_ids[None, :j])).logits[0, -1] + mrm.bias
                wanted += (logits[row.input_ids[j]].item() - row.rewards[j]) ** 2
    assert found == pytest.approx(wanted, rel=1e-4)
    assert batch.counted.sum() == sum(map(count, rows()))


def test_a_step_follows_the_gradient_of_the_mean(data, tmp_path, monkeypatch):
    trainer = Trainer(GUARD, data, tmp_path / "mrm", config(clip=0.0), device="cpu")
    seen = {}

    def stop(*_: object, **__: object) -> None:
        seen.update({name: parameter.grad.clone() for name, parameter in trainer.mrm.trained().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    torch.manual_seed(0)
    again = TrainableMrm(load_guard(GUARD, "float32"))
    batch = collate([trainer.rows[i] for i in trainer.order[0]])
    (again(batch.ids, batch.next_tokens) - batch.rewards)[batch.counted].square().mean().backward()
    for name, parameter in again.trained().items():
        torch.testing.assert_close(seen[name], parameter.grad, msg=name)


# Proposition 1 and what is trained at all


def test_proposition_1_gradient_of_unseen_bias_is_exactly_zero():
    mrm, batch = tiny_mrm(), collate(rows())
    (mrm(batch.ids, batch.next_tokens) - batch.rewards)[batch.counted].square().sum().backward()
    unseen = unseen_mask(rows(), VOCABULARY)
    assert unseen[VOCABULARY // 2 :].all() and not unseen.all()
    assert torch.all(mrm.bias.grad[unseen] == 0)
    assert torch.all(mrm.bias.grad[~unseen] != 0)


def test_proposition_1_training_leaves_unseen_bias_at_zero(trained):
    bias = torch.load(trained.out / "lm_head_bias.pt", weights_only=True)
    unseen = torch.load(trained.out / "unseen_mask.pt", weights_only=True)
    assert torch.equal(unseen, unseen_mask(trained.rows, len(bias)))
    assert unseen.any() and not unseen.all()
    assert torch.all(bias[unseen] == 0)
    assert torch.all(bias[~unseen] != 0)


def test_unseen_are_the_tokens_no_reward_is_for():
    rewards = np.array([1.0, np.nan, 0.5, 2.0], np.float32)
    row = AnnotatedConversation(np.array([5, 1, 2, 3]), np.ones(4, np.int8), rewards)
    assert unseen_mask([row], 6).tolist() == [True, True, False, False, True, True]


def test_only_lora_and_bias_change(trained):
    guard, state = load_guard(GUARD, "float32").state_dict(), trained.mrm.model.get_base_model().state_dict()
    for name, value in state.items():
        if "lora_" not in name:
            assert torch.equal(value, guard[name.replace(".base_layer", "")]), name
    names = set(trained.mrm.trained())
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in names - {"bias"})
    assert len(names) == 1 + 4 * 2 * 2  # four layers, two projections, two factors


def test_without_bias(data, tmp_path):
    trainer = Trainer(GUARD, data, tmp_path / "mrm", config(train_bias=False), device="cpu")
    trainer.train()
    assert "bias" not in trainer.mrm.trained()
    assert not torch.load(tmp_path / "mrm" / "lm_head_bias.pt", weights_only=True).any()


# The result


def test_result_is_the_trained_model(trained):
    trained.mrm.eval()
    loaded = MultifurcationRewardModel.from_pretrained(trained.out, dtype=torch.float32, device="cpu")
    assert torch.equal(loaded.unseen, trained.unseen)
    for row in trained.heldout:
        prefixes = [row.input_ids[:j].tolist() for j in range(1, len(row.input_ids))]
        batch = collate([row])
        with torch.no_grad():
            wanted = trained.mrm(batch.ids, batch.next_tokens)[0]
            found = loaded.logits(prefixes).gather(-1, batch.next_tokens[0][:, None])[:, 0]
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_training_lowers_the_error(trained):
    log = [json.loads(line) for line in (trained.run / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if "loss" in record]
    assert len(losses) == len(trained.order) == 6
    assert [record["step"] for record in log if "heldout" in record] == [3, 6]
    untrained = TrainableMrm(load_guard(GUARD, "float32"))
    batch = collate(trained.rows)
    with torch.no_grad():
        before, after = (
            (mrm(batch.ids, batch.next_tokens) - batch.rewards)[batch.counted].square().mean()
            for mrm in (untrained, trained.mrm)
        )
    assert after < 0.8 * before


def test_what_lies_in_the_folders(trained):
    weights = {"adapter_config.json", "adapter_model.safetensors", "lm_head_bias.pt", "unseen_mask.pt"}
    mrm = {*weights, "mrm_training.json", "training"}
    assert {file.name for file in trained.out.iterdir()} == mrm
    for name in ("curves.png", "scatter.png"):
        assert (trained.run / name).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((trained.run / "summary.json").read_text())
    assert summary["rewards"] == sum(map(count, trained.rows))
    assert summary["heldout_conversations"] == len(trained.heldout) == 2
    wanted = [agreement_by_hand(trained)[name] for name in ("tokens", "within_1", "root_mean_square_error")]
    found = [summary["heldout"][name] for name in ("tokens", "within_1", "root_mean_square_error")]
    assert found == pytest.approx(wanted, rel=1e-4)
    assert str(trained.out).encode() not in (trained.out / "adapter_config.json").read_bytes()


def agreement_by_hand(trained: Trainer) -> dict[str, float]:
    errors = []
    trained.mrm.eval()
    for row in trained.heldout:
        batch = collate([row])
        with torch.no_grad():
            errors += (trained.mrm(batch.ids, batch.next_tokens) - batch.rewards)[batch.counted].tolist()
    within = sum(abs(error) <= 1 for error in errors) / len(errors)
    return {
        "tokens": len(errors),
        "within_1": within,
        "root_mean_square_error": (sum(e * e for e in errors) / len(errors)) ** 0.5,
    }


# Interruption


def test_kill_and_resume(annotated, tmp_path):
    options = ["train-mrm", str(annotated), "--epochs", "6", "--batch", "2", "--lr", "0.01", "--heldout-share", "0.2"]
    options += ["--checkpoint-every", "1", "--evaluate-every", "4", "--dropout", "0.1", "--warmup", "3"]
    options += ["--schedule", "cosine", "--device", "cpu", "--threads", "1", "--seed", "5"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "saffron.cli", *options, "--output", str(killed)]
    process = subprocess.Popen(command)
    end = time.monotonic() + 120
    while not (killed / "training" / "checkpoint.safetensors").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "unseen_mask.pt").exists()
    with (killed / "training" / "log.jsonl").open("a") as log:
        log.write('{"step": 29, "lr": 0.1, "loss": 1.0, "rewards": 5}\n{"step": 30, "lo')  # after the last checkpoint
    (killed / "training" / ".saffron-checkpoint.safetensors.tmp").write_bytes(b"half")
    assert main([*options, "--output", str(killed)]) == 0
    assert main([*options, "--output", str(whole)]) == 0
    assert files(killed).keys() == files(whole).keys()
    for name, content in files(whole).items():
        assert files(killed)[name] == content, name
    steps = [json.loads(line)["step"] for line in (killed / "training" / "log.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 31))


def test_a_finished_run_is_left_alone(trained, data):
    before = files(trained.out)
    again = Trainer(GUARD, data, trained.out, config(epochs=2), device="cpu")
    result = again.train(lambda *_: pytest.fail("nothing is left to do"))
    assert result.steps == 6 and result.heldout
    assert files(trained.out) == before


def test_a_finished_run_replaces_another_mrm(trained, data, tmp_path):
    (tmp_path / "unseen_mask.pt").write_bytes(b"of another MRM")
    again = Trainer(GUARD, data, tmp_path, config(epochs=2), run=trained.run, device="cpu")
    assert again.train().steps == 6
    for name in ("adapter_model.safetensors", "lm_head_bias.pt", "unseen_mask.pt"):
        assert (tmp_path / name).read_bytes() == (trained.out / name).read_bytes(), name


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: content[:-40], lambda _: b""])
def test_damaged_checkpoint(trained, data, tmp_path, damage):
    run = tmp_path / "mrm" / "training"
    run.mkdir(parents=True)
    (run / "settings.json").write_bytes((trained.run / "settings.json").read_bytes())
    (run / "checkpoint.safetensors").write_bytes(damage((trained.run / "checkpoint.safetensors").read_bytes()))
    with pytest.raises(CheckpointError, match="checkpoint.safetensors: cannot be taken up"):
        Trainer(GUARD, data, tmp_path / "mrm", config(epochs=2), device="cpu").train()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"lr": 1e-3}, "lr was 0.01 and is now 0.001"),
        ({"seed": 1}, "seed"),
        ({"target_modules": ("q_proj",)}, "target"),
    ],
)
def test_other_settings_do_not_mix(trained, data, changes, name):
    before = files(trained.out)
    with pytest.raises(ConfigError, match=name):
        Trainer(GUARD, data, trained.out, config(epochs=2, **changes), device="cpu").train()
    assert files(trained.out) == before


def test_other_data_does_not_mix(trained, data):
    manifest = data.manifest | {"corpus": {"source": "another"}}
    with pytest.raises(ConfigError, match="data was"):
        Trainer(GUARD, RewardData(manifest, data.rows), trained.out, config(epochs=2), device="cpu").train()


@pytest.mark.parametrize(
    "name",
    ["config.json", "adapter_config.json", "adapter_model.safetensors", "training/log.jsonl", "training/curves.png"],
)
def test_a_model_of_another_is_not_spoilt(data, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match=f"holds {Path(name).name} of something else; choose another folder"):
        Trainer(GUARD, data, tmp_path, config(), device="cpu").train()
    assert (tmp_path / name).read_text() == "precious"


def test_loss_that_is_not_a_number(data, tmp_path):
    bad = replace(data.rows[0], rewards=np.full_like(data.rows[0].rewards, np.inf))
    trainer = Trainer(GUARD, RewardData(data.manifest, [bad] * 8), tmp_path / "mrm", config(), device="cpu")
    with pytest.raises(NumericalError, match="the loss is"):
        trainer.train()
    assert not (tmp_path / "mrm" / "lm_head_bias.pt").exists()


# Several devices

TWO = {
    "batch": 4,
    "checkpoint_every": 1,
    "clip": 0.0,
    "eps": 0.01,
}  # AdamW's usual eps would hide a factor of the gradient


def _one_of_two(rank: int, port: int, data: RewardData, out: Path) -> None:
    """A process of two, as `accelerate launch` starts them."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    Trainer(GUARD, data, out, config(**TWO), device="cpu").train()
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # a spawned process would import everything again
    processes = [
        context.Process(target=_one_of_two, args=(rank, port, data, tmp_path / "two"), daemon=True) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    Trainer(GUARD, data, tmp_path / "one", config(**TWO), device="cpu").train()
    settings = json.loads((tmp_path / "two" / "training" / "settings.json").read_text())
    assert settings["processes"] == 2
    one, two = (torch.load(tmp_path / name / "lm_head_bias.pt", weights_only=True) for name in ("one", "two"))
    assert one.abs().max() > 1e-2
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-3)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "training" / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours.get("loss", 0.0) == pytest.approx(theirs.get("loss", 0.0), rel=1e-4)
    evaluated = [record["heldout"]["tokens"] for log in logs for record in log if "heldout" in record]
    assert len(evaluated) == 2 and evaluated[0] == evaluated[1]


def test_bad_models_and_data(data, tmp_path):
    with pytest.raises(ConfigError, match="target_modules"):
        TrainableMrm(tiny_model(attention="eager"), target_modules=("nowhere",))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_guard(str(tmp_path), "float32")
    with pytest.raises(ConfigError, match="batch: got 50"):
        Trainer(GUARD, data, tmp_path / "mrm", config(batch=50), device="cpu")
