"""The rewards that an MRM learns from: a process reward's, for every prefix of every conversation of a corpus.

The prefixes of a conversation differ in little: all are read in one forward pass over the trie they form, in which the
conversation stands once and only the template's last words are run for each prefix. A reward that judges text instead
(`TextReward`) is given the text of every prefix of every response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saffron.errors import CheckpointError, ConfigError, NumericalError, outside, shown
from saffron.models.chat import Conversation as Turns
from saffron.models.chat import ConversationEncoder
from saffron.models.devices import find_device
from saffron.models.guard import ProcessRewardModel
from saffron.models.loading import load_tokenizer
from saffron.models.provenance import tokenizer_fingerprint
from saffron.models.text_rewards import RewardSource, check_reward, is_text_reward, load_reward, reward_fingerprint
from saffron.storage.folders import expect_same, locked, write_atomically, write_json
from saffron.storage.paths import check_output_folder
from saffron.storage.text import read_json
from saffron.training.conversations import Conversation, fingerprint
from saffron.training.layout import ConversationLayout, Layout, Prefixes
from saffron.training.shards import FORMAT, MANIFEST, decisive, encode_shard, identity, shard_file
from saffron.workers import Workers

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class AnnotateConfig:
    """What decides the rewards, to the last bit.

    Attributes:
        max_tokens, prefixes: see `ConversationLayout`. A reward of text judges responses only.
        batch: conversations of one forward pass.
        shard_size: conversations of one file.
        dtype, device: of the PRM, None: as `TrieModel.from_pretrained` chooses.
        scale: rewards are multiplied by it; an MRM learns rewards of a spread of some units soonest.
    """

    max_tokens: int = 128
    prefixes: Prefixes = "conversation"
    batch: int = 8
    shard_size: int = 256
    dtype: str | None = None
    device: str | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("batch", "shard_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not (isinstance(self.scale, int | float) and math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"scale: got {self.scale!r}, expected a finite number above 0")
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"dtype: got {shown(self.dtype)}, expected one of {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True)
class Shard:
    """Work for one worker: the conversations from number `first` on, of the run that `identity` names."""

    identity: str
    first: int
    conversations: Sequence[Conversation]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A shard that is done: the bytes of its file, how many conversations and rewards it holds."""

    content: bytes
    conversations: int
    rewards: int


class Annotator:
    """Gives conversations their rewards.

    Args:
        prm: whose rewards they are.
        encoder: of the MRM's tokenizer, for a reward of text; a guard has its own.

    Raises:
        ConfigError: a reward of text without encoder, or asked for the prefixes of what users say.
    """

    def __init__(self, prm: RewardSource, config: AnnotateConfig, encoder: ConversationEncoder | None = None) -> None:
        self.prm, self.config = prm, config
        if isinstance(prm, ProcessRewardModel):
            self.lay_out = ConversationLayout(prm, config.max_tokens, config.prefixes)
        elif encoder is None:
            raise ConfigError("tokenizer: got none; a reward of text needs the checkpoint whose tokenizer the MRM has")
        elif config.prefixes != "response":
            raise ConfigError(f"prefixes: got {config.prefixes!r}, expected 'response' for a reward of text")
        else:
            self.lay_out = ConversationLayout(encoder, config.max_tokens, config.prefixes)

    @classmethod
    def load(cls, prm: str, config: AnnotateConfig, tokenizer: str | None = None) -> Annotator:
        """Args: as `annotate`."""
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        with outside(f"{prm}: cannot be used as a guard", CheckpointError):
            loaded = load_reward(prm, dtype=dtype, device=config.device)
        if isinstance(loaded, ProcessRewardModel) or tokenizer is None:
            return cls(loaded, config)
        found = load_tokenizer(tokenizer)
        if found is None:
            raise CheckpointError(f"{tokenizer}: holds no tokenizer")
        return cls(loaded, config, ConversationEncoder(found, "mrm"))

    def rewards(self, layouts: Sequence[Layout]) -> list[list[float]]:
        """Rewards of every prefix of some conversations, in one forward pass.

        Raises:
            PromptTooLongError: in the PRM's template a conversation exceeds its context.
            NumericalError: a reward is not a number.
        """
        scores = self._scores(layouts) * self.config.scale
        if not scores.isfinite().all():
            raise NumericalError("the PRM gave a reward that is not a number")
        return [part.tolist() for part in scores.split([len(layout.ends) for layout in layouts])]

    def _scores(self, layouts: Sequence[Layout]) -> Tensor:
        if isinstance(self.prm, ProcessRewardModel):
            sequences = [prefix for layout in layouts for prefix in layout.prefixes()]
            self.prm.check_length("conversation in the template", max(map(len, sequences), default=0))
            return self.prm.score_tokens(sequences).float().cpu()
        return self.prm.score([pair for layout in layouts for pair in self._texts(layout)])

    def _texts(self, layout: Layout) -> list[tuple[Turns, str]]:
        """(what was said before, the response so far) of every prefix that gets a reward."""
        tokenizer = self.lay_out.encoder.tokenizer
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        pairs, turns = [], layout.turns()
        before = tuple(str(decode(turn)) for turn in turns)
        for number in range(1, len(turns), 2):
            said = Turns(before[:number])
            pairs += [(said, str(decode(turns[number][:end]))) for end in range(1, len(turns[number]) + 1)]
        return pairs

    def __call__(self, shard: Shard) -> Encoded:
        layouts = [self.lay_out(conversation) for conversation in shard.conversations]
        rewards: list[list[float]] = []
        for start in range(0, len(layouts), self.config.batch):
            rewards += self.rewards(layouts[start : start + self.config.batch])
        content = encode_shard(shard.identity, shard.first, layouts, rewards)
        return Encoded(content, len(layouts), sum(map(len, rewards)))


def annotate(
    conversations: Sequence[Conversation],
    prm: str,
    out: Path,
    config: AnnotateConfig,
    workers: Workers | None = None,
    *,
    tokenizer: str | None = None,
    source: str = "",
    progress: Callable[[int, int], None] = lambda conversations, rewards: None,
) -> dict[str, Any]:
    """Writes the rewards of a corpus to the folder `out`; what an interrupted run left there is taken up.

    Args:
        prm: checkpoint of the guard, or another process reward as `load_reward` reads it.
        tokenizer: checkpoint whose tokenizer the MRM has (its base), for a reward of text; a guard has its own.
        source: what the manifest names the corpus.
        progress: called with the number of conversations and rewards done since the last call; before the work starts
            with those that were there already, their rewards as 0.

    Raises:
        ConfigError: `out` holds rewards of another corpus, PRM or configuration, or another process writes there.
    """
    workers = workers or Workers()
    config = replace(config, device=str(find_device(config.device)))
    check_reward("prm", prm)
    if is_text_reward(prm):
        Annotator.load(prm, config, tokenizer)  # what is wrong with it is said before the folder is made
    else:
        tokenizer = None
    check_output_folder("output", out)
    manifest = _manifest(conversations, prm, tokenizer, config, workers, source)
    with locked(out):
        if (out / MANIFEST).exists():
            there = read_json(out / MANIFEST)
            expect_same(out, decisive(there), decisive(manifest))
            manifest = there  # the same but for what corpus and PRM are called
        elif any(out.glob("shard-*.parquet")):
            raise ConfigError(f"{out}: holds shards without a {MANIFEST}; choose another folder")
        else:
            write_json(out / MANIFEST, manifest)
        shards = list(_shards(identity(manifest), conversations, config.shard_size))
        missing = [number for number in range(len(shards)) if not shard_file(out, number).exists()]
        progress(len(conversations) - sum(len(shards[number].conversations) for number in missing), 0)
        done = workers.run(partial(Annotator.load, prm, config, tokenizer), [shards[number] for number in missing])
        for item, encoded in done:
            write_atomically(shard_file(out, missing[item]), encoded.content)
            progress(encoded.conversations, encoded.rewards)
    return manifest


def _shards(identity: str, conversations: Sequence[Conversation], size: int) -> Iterator[Shard]:
    for first in range(0, len(conversations), size):
        yield Shard(identity, first, conversations[first : first + size])


def _manifest(
    conversations: Sequence[Conversation],
    prm: str,
    tokenizer: str | None,
    config: AnnotateConfig,
    workers: Workers,
    source: str,
) -> dict[str, Any]:
    settings = asdict(config) | {"threads": workers.threads}
    if config.scale == 1:
        del settings["scale"]  # as in manifests of before there were others
    if tokenizer is not None:
        settings["tokenizer"] = tokenizer_fingerprint(tokenizer)
    base = prm.removeprefix("guard:") if tokenizer is None else tokenizer
    return {
        "format": FORMAT,
        "corpus": {"source": source, "fingerprint": fingerprint(conversations), "conversations": len(conversations)},
        "prm": {"source": str(prm), "fingerprint": reward_fingerprint(prm)},
        "base": base,
        "settings": settings,
        "shards": -(-len(conversations) // config.shard_size),
    }
