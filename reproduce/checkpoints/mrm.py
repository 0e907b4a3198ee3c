"""Makes the multifurcation reward model from the guard, as `saffron annotate` and `saffron train-mrm` make any. What is
made here is their corpus."""

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from reproduce.checkpoints.corpus import policy_prompt_ids
from reproduce.checkpoints.sampling import sample
from saffron.training.annotate import AnnotateConfig, annotate
from saffron.training.conversations import read_corpus
from saffron.training.shards import read_rewards
from saffron.training.train import TrainConfig, Trainer
from saffron.workers import torch_threads
from saffron.world import Request, answers, attack_tokens, requests

LONGEST_RESPONSE = 48
REWARDS = AnnotateConfig(prefixes="response", device="cpu")
CHUNK = 64  # conversations sampled at a time


@dataclass(frozen=True)
class Conversation:
    """The response as token ids: the text of one that stops in the middle of a word may be read as other tokens."""

    prompt: str
    response: list[int]


def reward_and_train(out: Path, work: Path, epochs: int, seed: int) -> float:
    """Has the guard reward what `write_corpus` wrote to `work`, and trains, as the commands in MODELS.md do.

    Returns:
        the share of next tokens whose reward is within 1 of the guard's, on conversations not trained on.
    """
    guard = str(out / "guard")
    for name in ("train", "heldout"):
        corpus = str(work / f"{name}.jsonl")
        annotate(read_corpus(corpus), guard, work / name, REWARDS, source=corpus)
    data, heldout = read_rewards(work / "train"), read_rewards(work / "heldout")
    with torch_threads(1):
        trainer = Trainer(
            guard, data, out / "mrm", recipe(epochs, seed), run=work / "run", heldout=heldout, device="cpu"
        )
        agreement = trainer.train().heldout
    assert agreement is not None
    return agreement.within_1


def recipe(epochs: int, seed: int) -> TrainConfig:
    """On a corpus this small few steps have to be enough: the learning rate is higher than the paper's."""
    return TrainConfig(batch=32, lr=5e-3, schedule="cosine", warmup=50, epochs=epochs, seed=seed)


def write_corpus(file: Path, conversations: Iterable[Conversation]) -> None:
    """JSON lines, as `saffron annotate` reads them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(asdict(conversation)) + "\n" for conversation in conversations))


def build_corpus(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> list[Conversation]:
    """A third the world's own text, the rest the policy's, under attack and without."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    streams = {kind: requests(kind, "train", seed) for kind in ("forbidden", "allowed")}
    corpus: list[Conversation] = []
    for _ in range(count // 3):
        request = next(streams["forbidden" if rng.random() < 0.7 else "allowed"])
        response = tokenizer.encode(
            (answers.refusal if rng.random() < 0.3 else answers.compliance)(request, rng), add_special_tokens=False
        )
        skipped = rng.randrange(0, 17) if rng.random() < 0.6 else 0
        response = (response + [tokenizer.eos_token_id])[skipped : skipped + LONGEST_RESPONSE]
        corpus.append(Conversation(request.text, response))
    with tqdm(total=count, initial=len(corpus), desc="policy samples", mininterval=2) as progress:
        while len(corpus) < count:
            wanted = [
                next(streams["forbidden" if rng.random() < 0.8 else "allowed"])
                for _ in range(min(CHUNK, count - len(corpus)))
            ]
            corpus += _policy_conversations(policy, tokenizer, wanted, rng, generator)
            progress.update(len(wanted))
    return corpus


def _policy_conversations(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    wanted: list[Request],
    rng: random.Random,
    generator: torch.Generator,
) -> list[Conversation]:
    """The policy's response to each request, mostly under attack."""
    starts = []
    for request in wanted:
        ids = policy_prompt_ids(tokenizer, request.text)
        if request.kind == "forbidden" and rng.random() < 0.9:
            ids = ids + attack_tokens(tokenizer, answers.compliance(request, rng, may_turn=False))
        starts.append(ids)
    explore = torch.tensor([rng.random() < 0.7 for _ in wanted])
    responses = sample(policy, starts, explore, generator)
    return [Conversation(request.text, response) for request, response in zip(wanted, responses, strict=True)]
