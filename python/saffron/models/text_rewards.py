"""Rewards of text by anything that scores it: a classifier, a rule, a service. They stand where a guard (a PRM) may."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from saffron.errors import CheckpointError, ConfigError, NumericalError, SaffronError, outside, reason, shown
from saffron.models.chat import Conversation, Prompt
from saffron.models.devices import find_device
from saffron.models.guard import ProcessRewardModel
from saffron.models.loading import load_tokenizer, quiet
from saffron.models.provenance import fingerprint
from saffron.models.weights import check_weights
from saffron.storage.paths import check_checkpoint

Score = Callable[[Sequence[Conversation], Sequence[str]], Any]
FORMS = "guard:CHECKPOINT, hf:CHECKPOINT#LABEL or module:function"
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


class TextReward:
    """A process reward model made of a function of text.

    Args:
        function: given conversations and as many responses, returns a reward each, higher is better; the conversation
            is what was said before the response. A response is often unfinished: process rewards are of prefixes.
        name: what messages and manifests call it.
        flops: declared cost of one call. A lexicon costs nothing; declare what the guard would cost that it stands for,
            and the methods' accounts say so.
        batch: responses of one call of the function, at most.
    """

    def __init__(self, function: Score, *, name: str = "", flops: int = 0, batch: int = 256) -> None:
        if not callable(function):
            raise ConfigError(f"function: got a value of type {type(function).__name__}, expected a callable")
        for what, value, least in (("flops", flops, 0), ("batch", batch, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{what}: got {value!r}, expected a whole number of at least {least}")
        self.function, self.flops, self.batch = function, flops, batch
        self.name = name or getattr(function, "__name__", type(function).__name__)

    @classmethod
    def classifier(cls, model: Any, label: Any, **options: Any) -> TextReward:
        """Of a scikit-learn classifier or pipeline over texts: the log-odds of a class for the response.

        Args:
            model: has `predict_proba`, or else a `decision_function` of two classes, and `classes_`.
            label: the class that is wanted, of `model.classes_`.
            options: of the constructor.

        Raises:
            ConfigError: no such class, or a model without these methods.
        """
        classes = list(getattr(model, "classes_", ()))
        if label not in classes:
            raise ConfigError(f"label: got {label!r}, expected one of {', '.join(map(str, classes))}")
        index = classes.index(label)
        if hasattr(model, "predict_proba"):

            def score(_: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
                probability = torch.as_tensor(model.predict_proba(list(responses)), dtype=torch.float64)[:, index]
                return probability.clamp(1e-12, 1 - 1e-12).logit()

        elif hasattr(model, "decision_function") and len(classes) == 2:

            def score(_: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
                value = torch.as_tensor(model.decision_function(list(responses)), dtype=torch.float64)
                return value if index == 1 else -value

        else:
            raise ConfigError("model: expected predict_proba, or a decision_function of two classes")
        return cls(score, **{"name": type(model).__name__, **options})

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> Tensor:
        """Rewards `[pairs]` of (prompt, response) pairs, fp32.

        Raises:
            ConfigError: the function failed, or returned something else than a number for each.
            NumericalError: a reward that is not finite.
        """
        found: list[Tensor] = []
        for first in range(0, len(pairs), self.batch):
            part = pairs[first : first + self.batch]
            conversations = [Conversation.of(prompt) for prompt, _ in part]
            with outside(f"reward {self.name}: the function failed"):
                given = self.function(conversations, [response for _, response in part])
            with outside(f"reward {self.name}: expected a number for each response"):
                values = torch.as_tensor(given, dtype=torch.float32).reshape(-1).cpu()
            if len(values) != len(part):
                raise ConfigError(f"reward {self.name}: got {len(values)} rewards for {len(part)} responses")
            found.append(values)
        scores = torch.cat(found) if found else torch.empty(0)
        if not bool(scores.isfinite().all()):
            raise NumericalError(f"reward {self.name}: gave a value that is not finite (NaN or infinity)")
        return scores

    # What a search asks of a reward model, in tokens: here they are the bytes of the conversation.

    def context_tokens(self, prompt: Prompt) -> list[int]:
        """The conversation as UTF-8 bytes of the JSON list of its turns; `conversation` reads them."""
        return list(json.dumps(Conversation.of(prompt).turns, ensure_ascii=False).encode())

    def conversation(self, tokens: Sequence[int]) -> Conversation:
        """What `context_tokens` wrote. Raises `ConfigError` for anything else."""
        with outside("reward tokens: expected those of TextReward.context_tokens"):
            turns = json.loads(bytes(tokens))
            if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
                raise ValueError("no list of texts")
        return Conversation(tuple(turns))

    def check_tokens(self, name: str, tokens: Sequence[int]) -> None:
        """As `TrieModel.check_tokens`."""
        try:
            self.conversation(tokens)
        except SaffronError as error:
            raise ConfigError(f"{name}: {error}") from error

    def check_length(self, name: str, tokens: int, new_tokens: int = 0) -> None:
        """As `TrieModel.check_length`: text has no greatest length."""


RewardSource = ProcessRewardModel | TextReward


def check_reward(name: str, spec: str | Path | None) -> None:
    """Refuses a reward that there cannot be, before anything is loaded.

    Args:
        name: of the option.
        spec: as `load_reward` reads it; None passes.

    Raises:
        ConfigError, CheckpointError: what is wrong with it.
    """
    if spec is None:
        return
    kind, place = _parse(spec)
    if kind == "function":
        return
    check_checkpoint(name, place.partition("#")[0] if kind == "hf" else place)


def load_reward(
    spec: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, **options: Any
) -> RewardSource:
    """The reward that a text names.

    Args:
        spec: `guard:CHECKPOINT`, or the checkpoint alone: a `ProcessRewardModel`. `hf:CHECKPOINT#LABEL`: a sequence
            classifier of `transformers`; the reward is the log-odds of that label for the response, or of any other
            label with `#!LABEL`; a model of one output gives it as it is. `module:function`: a function as `TextReward`
            takes it, or a `TextReward`, that an importable module holds.
        dtype, device: of a model.
        options: of `ProcessRewardModel`.

    Raises:
        CheckpointError: nothing loadable there. ConfigError: no such label, module or function.
    """
    kind, place = _parse(spec)
    if kind == "guard":
        return ProcessRewardModel.from_pretrained(place, dtype=dtype, device=device, **options)
    return _function(place) if kind == "function" else _classifier(place, dtype, device)


def reward_fingerprint(spec: str | Path) -> str:
    """What tells rewards apart: of a checkpoint its files and the label, of a function the source of its module."""
    kind, place = _parse(spec)
    if kind == "guard":
        return fingerprint(place)
    if kind == "hf":
        checkpoint, _, label = place.partition("#")
        return f"{fingerprint(checkpoint)}#{label}"
    module = _module(place)
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):  # compiled
        source = str(getattr(module, "__version__", ""))
    return f"{place} {hashlib.sha256(source.encode(errors='surrogateescape')).hexdigest()}"


def is_text_reward(spec: str | Path) -> bool:
    """Whether it judges text, and so has no tokenizer of its own."""
    return _parse(spec)[0] != "guard"


def _parse(spec: str | Path) -> tuple[str, str]:
    """(guard, hf or function; what it names)."""
    text = str(spec)
    for kind in ("guard", "hf"):
        if text.startswith(f"{kind}:"):
            place = text.removeprefix(f"{kind}:")
            if not place.partition("#")[0]:
                raise ConfigError(f"reward: got {shown(text)}, expected {FORMS}")
            return kind, place
    if isinstance(spec, str) and _FUNCTION.fullmatch(text):
        return "function", text
    return "guard", text


def _module(place: str) -> Any:
    name = place.partition(":")[0]
    if os.getcwd() not in sys.path:  # which the `saffron` script does not look into; behind all else, to hide nothing
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a module may raise anything, and some are scripts
        raise ConfigError(f"reward: {place}: the module {name} cannot be imported ({reason(error)})") from error


def _function(place: str) -> TextReward:
    found = _module(place)
    for part in place.partition(":")[2].split("."):
        if not hasattr(found, part):
            raise ConfigError(f"reward: {place}: the module has no {part}")
        found = getattr(found, part)
    return found if isinstance(found, TextReward) else TextReward(found, name=place)


def _classifier(place: str, dtype: torch.dtype | None, device: torch.device | str | None) -> TextReward:
    checkpoint, _, label = place.partition("#")
    where = find_device(device)
    check_checkpoint("reward", checkpoint)
    with quiet(), outside(f"{checkpoint}: cannot be loaded as a sequence classifier", CheckpointError):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            checkpoint, dtype=dtype or torch.float32, output_loading_info=True
        )
    if info["missing_keys"]:  # transformers fills what is missing with random numbers
        raise CheckpointError(f"{checkpoint}: no sequence classifier (weights of its head are missing)")
    check_weights(model, "classifier")
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise CheckpointError(f"{checkpoint}: holds no tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    model = model.to(where).eval()
    index = _label(model.config, label)

    def score(_: Sequence[Conversation], responses: Sequence[str]) -> Tensor:
        inputs = tokenizer(list(responses), padding=True, truncation=True, return_tensors="pt").to(where)
        logits = model(**inputs).logits.double()
        if index is None:
            return logits[:, 0]
        found = logits.log_softmax(-1)
        others = torch.cat([found[:, :index], found[:, index + 1 :]], 1).logsumexp(1)
        return (others - found[:, index]) if label.startswith("!") else (found[:, index] - others)

    # A classifier reads a response whole: about 32 tokens, two FLOPs a weight each.
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return TextReward(score, name=f"hf:{place}", flops=64 * weights, batch=32)


def _label(config: Any, label: str) -> int | None:
    names = {str(name): int(i) for i, name in config.id2label.items()}
    if config.num_labels == 1 and not label:
        return None
    if label.removeprefix("!") not in names or config.num_labels == 1:
        wanted = ", ".join(names) if config.num_labels > 1 else "none, as the model has one output"
        raise ConfigError(f"reward: label: got {shown(label)}, expected one of {wanted}")
    return names[label.removeprefix("!")]
