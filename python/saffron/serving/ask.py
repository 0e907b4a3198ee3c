"""A request, read and checked: which method runs, on what, and how its answer is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saffron.adaptive import AdaptiveWidth, WidthControl
from saffron.errors import ConfigError, shown
from saffron.models.bundled import Models
from saffron.models.chat import Conversation
from saffron.models.guard import ProcessRewardModel
from saffron.models.trie_model import TrieModel
from saffron.search.adaptive import AdaptiveSearch
from saffron.search.best_of_n import BestOfN, BestOfNConfig
from saffron.search.config import Request, SearchConfig
from saffron.search.method import Decoder
from saffron.search.undefended import GreedyConfig, GreedyDecoding
from saffron.serving.errors import ApiError, bad
from saffron.serving.settings import Settings

if TYPE_CHECKING:
    from saffron.search.rewards import RewardModel

Trace = bool | Literal["page"]
OWN = ("method", "trace")  # keys of `saffron` that are no hyperparameters


@dataclass(frozen=True, slots=True)
class Variant:
    """One model that the server lists: a way to decode the policy.

    Attributes:
        id: how clients name it. method: what `saffron.method` calls it.
        defaults: its configuration, where a request says nothing.
        decoder: makes the method; None: a search of the engine.
        reward: the model that the method is guided by.
        adaptive: chooses the widths, which requests then cannot.
    """

    id: str
    method: str
    defaults: Any
    decoder: Callable[[Any], Decoder[Any]] | None
    reward: RewardModel | None
    adaptive: AdaptiveSearch | None = None


def variants(models: Models, settings: Settings) -> dict[str, Variant]:
    """What the server serves, by name; the defended model is the first."""
    policy, mrm, guard = models
    config, name = settings.config, settings.name
    made = [Variant(name, "saffron", config, None, mrm)]
    if settings.undefended:
        greedy = GreedyConfig(max_new_tokens=config.max_new_tokens)
        made.append(
            Variant(f"{name}-undefended", "undefended", greedy, lambda c: GreedyDecoding(policy, config=c), None)
        )
    if settings.best_of_n is not None:
        reward = mrm if guard is None else guard
        drawn = BestOfNConfig(
            n=settings.best_of_n, max_new_tokens=config.max_new_tokens, min_new_tokens=config.min_new_tokens,
            top_p=config.top_p,
        )  # fmt: skip
        made.append(Variant(f"{name}-best-of-n", "best-of-n", drawn, lambda c: BestOfN(policy, reward, c), reward))
    if settings.adaptive is not None:
        made.append(_adaptive(models, settings, settings.adaptive))
    return {variant.id: variant for variant in made}


def _adaptive(models: Models, settings: Settings, state: Path) -> Variant:
    """Saffron search with the widths of a file of state.

    Raises:
        CheckpointError: it cannot be read. ConfigError: no guard rates conversations, or widths exceed the server's.
    """
    policy, mrm, guard = models
    if not isinstance(guard, ProcessRewardModel):
        raise ConfigError("adaptive: got no guard that is a process reward model, expected one (--prm)")
    width = AdaptiveWidth.load(state)
    if width.max_width > settings.max_width:
        raise ConfigError(
            f"adaptive: its widest search is {width.max_width}, more than the server's {settings.max_width}"
        )
    config = replace(settings.config, width=width.max_width)
    search = AdaptiveSearch(policy, mrm, guard, width, config)
    return Variant(f"{settings.name}-adaptive", "adaptive", config, None, mrm, search)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one request wants.

    Attributes:
        variant, config: the method and its hyperparameters.
        request: what the models read before the answer.
        conversation: None for a plain prompt.
        n: answers, from the final beam. stop: texts before which an answer is cut.
        trace: return the whole search, as records or drawn as a page.
        logprobs: how many alternatives of each token are wanted with its log-probability; None: neither.
        control: chooses the widths; None: nobody does.
    """

    variant: Variant
    config: Any
    request: Request
    conversation: Conversation | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    trace: Trace = False
    logprobs: int | None = None
    control: WidthControl | None = None

    @property
    def defended(self) -> bool:
        """It is a search of the engine."""
        return self.variant.decoder is None


def choose(known: Mapping[str, Variant], model: str | None, own: Mapping[str, Any]) -> Variant:
    """The variant that a request names by `model` and, if it does, by `saffron.method`."""
    first = next(iter(known.values()))
    variant = first if model is None else known.get(model)
    if variant is None:
        raise ApiError(
            404, f"model: got {shown(model)}, expected one of {', '.join(known)}", param="model", code="model_not_found"
        )
    method = own.get("method")
    if method is None or method == variant.method:
        return variant
    methods = {one.method: one for one in known.values()}
    if not isinstance(method, str) or method not in methods:
        raise bad("saffron.method", f"got {shown(method)}, expected one of {', '.join(methods)}")
    if variant is not first:
        raise bad("saffron.method", f"got {method!r}, and the model {variant.id!r} is another method")
    return methods[method]


def configure(variant: Variant, own: Mapping[str, Any], settings: Settings, max_tokens: int | None, left: int) -> Any:
    """The configuration of a request: the server's, but for what the request's `saffron` says.

    Args:
        max_tokens: of the request; None: as many as the server gives.
        left: new tokens for which the models have room.

    Raises:
        ApiError, ConfigError: an unknown key, a value that is not allowed, or one above the server's limits.
    """
    names = {field.name for field in fields(variant.defaults)} - {"max_new_tokens"}
    options = names - {"width"} if variant.adaptive is not None else names
    for name in own:
        if name == "max_new_tokens":
            raise bad("saffron.max_new_tokens", "say max_tokens, outside of saffron")
        if name not in options and name not in OWN:
            allowed = ", ".join((*OWN, *sorted(options)))
            raise bad("saffron", f"got {shown(name)}, expected {allowed}", "unknown_parameter")
    given = {name: value for name, value in own.items() if name in options and value is not None}
    values = {name: getattr(variant.defaults, name) for name in names} | given
    breadth_name = "width" if isinstance(variant.defaults, SearchConfig) else "n"
    breadth = values.get(breadth_name, 1)
    known = breadth if isinstance(breadth, int) and breadth > 0 else 1
    if known > settings.max_width:
        raise bad(f"saffron.{breadth_name}", f"got {shown(breadth)}, this server allows {settings.max_width} at most")
    if max_tokens is None:
        max_tokens = max(1, min(variant.defaults.max_new_tokens, left, settings.max_beam_tokens // known))
    if known * max_tokens > settings.max_beam_tokens:
        raise bad(
            f"saffron.{breadth_name}",
            f"{known} times {max_tokens} tokens exceed the {settings.max_beam_tokens} that this server allows",
        )
    if "min_new_tokens" in options and "min_new_tokens" not in given:
        values["min_new_tokens"] = min(values["min_new_tokens"], max_tokens)
    try:
        return type(variant.defaults)(**values, max_new_tokens=max_tokens)
    except ConfigError as error:
        raise bad("saffron", str(error)) from error
    except (TypeError, ValueError) as error:
        raise bad("saffron", "a value of a type that is not allowed") from error


def room(models: Sequence[tuple[TrieModel, int]]) -> int:
    """New tokens for which models have room behind so many tokens of a prompt."""
    return min((m.context - tokens for m, tokens in models if m.context is not None), default=1 << 30)
