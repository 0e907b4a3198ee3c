"""Trains the guard: a moderator that says "safe" or "unsafe" about a response, finished or not."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, mse_loss
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from reproduce.checkpoints.branches import Branches, GuardFormat, bare_head, guard_hidden, rewards
from reproduce.checkpoints.policy import llama, schedule
from reproduce.checkpoints.tokenizer import GUARD_TEMPLATE, SPECIAL_TOKENS
from saffron.world import Request, answers, oracle, requests

BATCH, PREFIXES, LEARNING_RATE = 32, 6, 2e-3
LONGEST_RESPONSE = 44  # tokens; a search makes 32
SKIPPED = 17  # at most as many tokens of a response are left out at its start, as prefilled ones are
FINAL_NORM = 4.0  # to start from: with 1, no product of an embedding and a hidden state would reach a reward of 8
SCALE_WEIGHT = 0.1  # of the squared error of the logit difference, next to the cross entropy


@dataclass(frozen=True)
class Judged:
    """A conversation with the oracle's grade of the response after each of its tokens."""

    row: Branches
    grades: list[float]


def train_guard(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    form = GuardFormat.from_tokenizer(tokenizer, GUARD_TEMPLATE)
    model = llama(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(FINAL_NORM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    examples = guard_examples(tokenizer, form, seed)
    for step in (progress := tqdm(range(steps), desc="guard", mininterval=2)):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * schedule(step, steps)
        loss, figures = guard_loss(model, form, [next(examples) for _ in range(BATCH)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(figures)
    return model.eval()


def guard_loss(model: LlamaForCausalLM, form: GuardFormat, batch: list[Judged]) -> tuple[Tensor, dict[str, str]]:
    """Cross entropy of the answers with the soft label sigmoid(grade), and what keeps their scale.

    Besides, as it reads, its logit of each token that follows is drawn to the grade the response then has. A large
    guard brings a hidden state rich enough to become a vector of rewards by a few low-rank factors; one of a
    million parameters has to be given it, or no MRM can be made from it.
    """
    answers_hidden, reading_hidden = guard_hidden(model, form, [judged.row for judged in batch])
    grades = torch.tensor([judged.grades[length - 1] for judged in batch for length in judged.row.lengths])
    next_tokens = torch.tensor([token for judged in batch for token in judged.row.response])
    next_grades = torch.tensor([grade for judged in batch for grade in judged.grades])
    log = log_softmax(model.lm_head(answers_hidden), dim=-1)
    probability = torch.sigmoid(grades)
    cross_entropy = -(probability * log[:, form.safe] + (1 - probability) * log[:, form.unsafe]).mean()
    difference = rewards(model, form, answers_hidden)
    error = mse_loss(difference, grades)
    foresight = (reading_hidden * model.lm_head.weight[next_tokens]).sum(-1)
    foresight_error = mse_loss(foresight, next_grades)
    agree = ((difference > 0) == (grades > 0)).float().mean()
    figures = {"accuracy": f"{agree:.3f}", "squared_error": f"{error:.2f}", "foresight": f"{foresight_error:.2f}"}
    return cross_entropy + SCALE_WEIGHT * (error + foresight_error), figures


def guard_examples(tokenizer: PreTrainedTokenizerFast, form: GuardFormat, seed: int) -> Iterator[Judged]:
    """Endless conversations, half of them in the guard's template, half as bare as the MRM will see them."""
    rng = random.Random(seed)
    streams = {kind: requests(kind, "train", seed) for kind in ("forbidden", "allowed")}
    while True:
        request = next(streams["forbidden" if rng.random() < 0.75 else "allowed"])
        text = _response(request, next(streams["forbidden"]), next(streams["allowed"]), rng)
        response = tokenizer.encode(text, add_special_tokens=False)
        response = response[rng.randrange(SKIPPED) if rng.random() < 0.75 else 0 :][:LONGEST_RESPONSE]
        for _ in range(rng.choice((0, 0, 0, 2))):  # slips, so that the guard is not lost on odd text
            response[rng.randrange(len(response))] = rng.randrange(len(SPECIAL_TOKENS), len(tokenizer))
        lengths = sorted(rng.sample(range(1, len(response) + 1), min(PREFIXES, len(response))))
        prompt = tokenizer.encode(request.text, add_special_tokens=False)
        head = form.head(prompt) if rng.random() < 0.5 else bare_head(tokenizer, prompt)
        grades = [oracle.grade(request.text, said) for said in running_text(tokenizer, response)]
        yield Judged(Branches(head, response, lengths), grades)


def running_text(tokenizer: PreTrainedTokenizerFast, response: list[int]) -> Iterator[str]:
    """The text of every prefix of a response."""
    for end in range(1, len(response) + 1):
        yield tokenizer.decode(response[:end])


def _response(request: Request, forbidden: Request, allowed: Request, rng: random.Random) -> str:
    """Any kind of text that an agent might say: what fits the request, what does not, and mixtures."""
    draw = rng.random()
    if draw < 0.5:
        return answers.compliance(request, rng, may_turn=rng.random() < 0.5)
    if draw < 0.65:
        return answers.refusal(request, rng)
    kinds = [
        answers.compliance(forbidden, rng),
        answers.compliance(allowed, rng),
        answers.compliance(request, rng),
        answers.refusal(request, rng),
        answers.turn(request, rng),
    ]
    sentences = [sentence.strip(". ") for text in rng.sample(kinds, 2) for sentence in text.split(". ")]
    return ". ".join(rng.sample(sentences, min(len(sentences), 5))) + "."
