"""All methods by name, and the texts that choose one: `saffron:width=16,top_p=0.8`, `best-of-n:n=32`, `greedy`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from saffron.errors import ConfigError
from saffron.models.bundled import Models
from saffron.models.checks import expect
from saffron.models.checks import kind as kind_of
from saffron.search.adaptive import AdaptiveConfig, AdaptiveSearch
from saffron.search.args import ARGS, ARGSConfig
from saffron.search.beam import BeamConfig, BeamSearch
from saffron.search.best_of_n import BestOfN, BestOfNConfig
from saffron.search.cards import CARDS, CARDSConfig
from saffron.search.config import SearchConfig
from saffron.search.deal import DeAL, DeALConfig
from saffron.search.decoding import DecodingConfig, check_lengths
from saffron.search.mcts import MCTS, MCTSConfig
from saffron.search.method import Method
from saffron.search.rebase import Rebase, RebaseConfig
from saffron.search.saffron import SaffronSearch
from saffron.search.undefended import GreedyConfig, GreedyDecoding, Sampling, SamplingConfig


@dataclass(frozen=True, slots=True)
class Kind:
    """One entry of `METHODS`.

    Attributes:
        summary: one line.
        config: a dataclass whose fields are the method's options.
        build: makes the method from the models (policy, MRM, guard) and its configuration.
    """

    summary: str
    config: type
    build: Callable[[Models, Any], Method]

    def options(self) -> dict[str, Any]:
        """Every option and its default."""
        return {field.name: field.default for field in fields(self.config)}


def _guided(name: str, summary: str, config: type[DecodingConfig], method: Callable[..., Method]) -> dict[str, Kind]:
    """A method that takes either reward model, under its name with the PRM and under `name-mrm` with the MRM."""
    return {
        name: Kind(f"{summary}, with the guard (a PRM)", config, lambda m, c: method(m.policy, m.guard, c)),
        f"{name}-mrm": Kind(f"{summary}, with the MRM", config, lambda m, c: method(m.policy, m.mrm, c)),
    }


METHODS: dict[str, Kind] = {
    "greedy": Kind(
        "undefended: the most probable token",
        GreedyConfig,
        lambda m, c: GreedyDecoding(m.policy, config=c),
    ),
    "sample": Kind("undefended: top-p sampling", SamplingConfig, lambda m, c: Sampling(m.policy, config=c)),
    "saffron": Kind("Saffron search", SearchConfig, lambda m, c: SaffronSearch(m.policy, m.mrm, c)),
    "adaptive": Kind(
        "Saffron search with the widths of a file of AdaptiveWidth.save",
        AdaptiveConfig,
        lambda m, c: AdaptiveSearch.from_config(m.policy, m.mrm, m.guard, c),
    ),
    **_guided("best-of-n", "the safest of n samples", BestOfNConfig, BestOfN),
    **_guided("beam", "beam search by reward", BeamConfig, BeamSearch),
    **_guided("rebase", "reward-balanced tree search", RebaseConfig, Rebase),
    **_guided("deal", "tokens judged by a greedy lookahead", DeALConfig, DeAL),
    **_guided("mcts", "Monte Carlo tree search", MCTSConfig, MCTS),
    **_guided("args", "tokens by log-probability plus reward", ARGSConfig, ARGS),
    **_guided("cards", "segments drawn until one is accepted", CARDSConfig, CARDS),
}


def parse_method(spec: str, models: Models, **defaults: Any) -> Method:
    """Makes the method that a text names.

    Args:
        spec: a name of `METHODS`, and after a colon its options, `name=value` with commas between them.
        models: policy, MRM and guard, as `load_bundled` returns them.
        defaults: options to use where the text does not say otherwise; those that the method does not have are
            left out, so that one set serves many methods.

    Raises:
        ConfigError: a method, option or value that is not allowed.
    """
    kind, config = parse_config(spec, **defaults)
    missing = [name for name in ("policy", "mrm", "guard") if not hasattr(models, name)]
    if missing:
        raise ConfigError(
            f"models: got {kind_of(models)} without {', '.join(missing)}, expected what load_bundled returns"
        )
    return kind.build(models, config)


def parse_config(spec: str, **defaults: Any) -> tuple[Kind, Any]:
    """`parse_method` up to the models: the method's entry in `METHODS` and its configuration, checked."""
    expect("method", spec, str)
    name, _, rest = spec.partition(":")
    kind = METHODS.get(name.strip())
    if kind is None:
        raise ConfigError(f"method: got {name.strip()!r}, expected one of {', '.join(METHODS)}")
    types = get_type_hints(kind.config)
    presets = {"preset": str} if kind.config is SearchConfig else {}
    options = {option: value for option, value in defaults.items() if option in types}
    given: set[str] = set()
    for part in filter(None, (part.strip() for part in rest.split(","))):
        option, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals or option not in {**types, **presets}:
            allowed = ", ".join([*types, *presets])
            raise ConfigError(f"{name.strip()}: got {part!r}, expected option=value with one of {allowed}")
        if option in given:
            raise ConfigError(f"{name.strip()}: got {option} twice")
        given.add(option)
        options[option] = _value(text, types.get(option))
    config = SearchConfig.preset(options.pop("preset", "paper"), **options) if presets else kind.config(**options)
    check_lengths(config)
    return kind, config


def _value(text: str, wanted: Any) -> Any:
    """An option's value; what is no such number stays text, which the configuration refuses by name."""
    if wanted is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if wanted == float | None and text.lower() == "none":
        return None
    if wanted in (int, float, float | None):
        try:
            return int(text) if wanted is int else float(text)
        except ValueError:
            return text
    return text
