"""Many prefixes of one response judged in one forward pass of the guard.

The guard reads template + prompt + response + suffix and answers at the last position. To judge several prefixes of a
response, the suffix is put behind the whole response several times; each copy sees the response only as far as its
prefix goes, and takes the positions that follow it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from reproduce.checkpoints.tokenizer import MRM_BEFORE_PROMPT, MRM_BEFORE_RESPONSE

PROMPT_MARK, RESPONSE_MARK = "PROMPTMARK", "RESPONSEMARK"


@dataclass(frozen=True)
class GuardFormat:
    """The guard's chat template in pieces, as token ids: before | prompt | between | response | after."""

    before: list[int]
    between: list[int]
    after: list[int]
    safe: int
    unsafe: int

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerFast, template: str) -> "GuardFormat":
        messages = [{"role": "user", "content": PROMPT_MARK}, {"role": "assistant", "content": RESPONSE_MARK}]
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        before, rest = text.split(PROMPT_MARK)
        pieces = [tokenizer.encode(piece, add_special_tokens=False) for piece in (before, *rest.split(RESPONSE_MARK))]
        safe, unsafe = (tokenizer.encode(word, add_special_tokens=False) for word in ("safe", "unsafe"))
        if len(safe) != 1 or len(unsafe) != 1:
            raise ValueError(f'"safe" and "unsafe" must be one token each, got {safe} and {unsafe}')
        return cls(*pieces, safe[0], unsafe[0])

    def head(self, prompt: list[int]) -> list[int]:
        """Everything before the response."""
        return self.before + prompt + self.between


def bare_head(tokenizer: PreTrainedTokenizerFast, prompt: list[int]) -> list[int]:
    """What the MRM reads before the response: the conversation without the guard's task."""
    before, between = (
        tokenizer.encode(text, add_special_tokens=False) for text in (MRM_BEFORE_PROMPT, MRM_BEFORE_RESPONSE)
    )
    return before + prompt + between


@dataclass(frozen=True)
class Branches:
    """What stands before a response, the response, and the lengths of its prefixes to judge."""

    head: list[int]
    response: list[int]
    lengths: list[int]


def guard_hidden(model: LlamaForCausalLM, form: GuardFormat, rows: list[Branches]) -> tuple[Tensor, Tensor]:
    """Last hidden states: where the guard answers [prefixes, hidden], before each response token [tokens, hidden]."""
    width = max(len(row.head) + len(row.response) + len(form.after) * len(row.lengths) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    visible = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself: no row may be empty
    answers, reading = torch.zeros(2, len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        _lay_out(form, row, ids[index], positions[index], visible[index])
        trunk, suffix = len(row.head) + len(row.response), len(form.after)
        reading[index, len(row.head) - 1 : trunk - 1] = True
        answers[index, trunk + suffix - 1 : trunk + suffix * len(row.lengths) : suffix] = True
    mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    hidden = model.model(input_ids=ids, position_ids=positions, attention_mask=mask[:, None]).last_hidden_state
    return hidden[answers], hidden[reading]


def _lay_out(form: GuardFormat, row: Branches, ids: Tensor, positions: Tensor, visible: Tensor) -> None:
    """Fills one row: ids [width], positions [width], visible [query, key]."""
    trunk, suffix = row.head + row.response, len(form.after)
    ids[: len(trunk)] = torch.tensor(trunk)
    positions[: len(trunk)] = torch.arange(len(trunk))
    visible[: len(trunk), : len(trunk)] = torch.ones(len(trunk), len(trunk), dtype=torch.bool).tril()
    for branch, length in enumerate(row.lengths):
        copy = slice(len(trunk) + branch * suffix, len(trunk) + (branch + 1) * suffix)
        judged = len(row.head) + length
        ids[copy] = torch.tensor(form.after)
        positions[copy] = torch.arange(judged, judged + suffix)
        visible[copy, :judged] = True
        visible[copy, copy] = torch.ones(suffix, suffix, dtype=torch.bool).tril()


def rewards(model: LlamaForCausalLM, form: GuardFormat, hidden: Tensor) -> Tensor:
    """The process reward logit("safe") - logit("unsafe") of hidden states [rows, hidden], [rows]."""
    return hidden @ (model.lm_head.weight[form.safe] - model.lm_head.weight[form.unsafe])
