"""What several commands share: types of options, options of models, the search and the workers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from saffron.errors import ConfigError, MissingDependencyError, SaffronError, shown
from saffron.search.config import PRESETS, EosScore, PathScore, PolicyScore, Ranking, SearchConfig
from saffron.search.decoding import check_lengths
from saffron.storage.paths import check_checkpoint
from saffron.storage.text import check_text

if TYPE_CHECKING:
    from saffron.workers import Workers

Commands = Any  # what `add_subparsers` returns: argparse has no public name for it
MOST = 2**31 - 1  # numbers are int32 in the ops
DEVICE_HELP = "cpu, cuda or cuda:NUMBER (default: the GPU if there is one)"


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of an option that is a whole number."""

    def read(text: str) -> int:
        digits = text.removeprefix("-")
        value = int(text) if digits.isascii() and digits.isdecimal() and len(digits) < 20 else None
        if value is None or not least <= value <= most:
            kind = f" of at least {least}" if most == MOST else f" from {least} to {most}"
            kind = "" if least == -MOST and value is None else kind  # the configuration knows the least value
            raise argparse.ArgumentTypeError(f"got {shown(text)}, expected a whole number{kind}")
        return value

    return read


positive = whole(1)
seed = whole(0, 2**32 - 1)


def number(text: str) -> float:
    """The type of an option that is a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {shown(text)}, expected a finite number")
    return value


def above_zero(text: str) -> float:
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"got {shown(text)}, expected a number above 0")
    return value


def path(text: str) -> Path:
    """The type of an option that names a file or folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"got {shown(text)}, expected a path")
    return Path(text)


def words(text: str) -> str:
    """The type of an option that is a text."""
    try:
        return check_text("text", text)
    except SaffronError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def name(text: str) -> str:
    """The type of an option that names something: a checkpoint, a data set, a method. It may be a path."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"got {shown(text)}, expected a name")
    return text


def add_model_options(parser: argparse.ArgumentParser | Any, *models: str) -> None:
    """One option for each of the models a command needs, and the device."""
    helps = {
        "policy": "checkpoint to defend (default: the bundled policy)",
        "mrm": "folder of the reward model, published format (default: the bundled one)",
        "base": "checkpoint the MRM's adapter is merged into (default: the one it names; where that is the policy, "
        "the MRM shares its weights)",
        "prm": "the guard, a checkpoint, or another process reward: hf:CHECKPOINT#LABEL or module:function (default: "
        "the bundled guard)",
    }
    for model in models:
        parser.add_argument(f"--{model}", type=name, metavar="CHECKPOINT", help=helps[model])
    parser.add_argument("--device", metavar="DEVICE", help=DEVICE_HELP)


def add_engine_options(parser: argparse.ArgumentParser | Any) -> None:
    """What runs the policy; `check_engine` and `engine` read them."""
    parser.add_argument("--engine", choices=["saffron", "vllm"], default="saffron", help="what runs the policy")
    parser.add_argument(
        "--vllm", type=_assignment, action="append", default=[], metavar="NAME=VALUE",
        help="an argument of vLLM's engine, such as tensor_parallel_size=2 (with --engine vllm)",
    )  # fmt: skip


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"got {shown(text)}, expected NAME=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:  # a word
        return key, value


def check_engine(options: argparse.Namespace) -> None:
    """Also sets what vLLM reads from the environment when it is imported.

    Raises:
        ConfigError: options that the engine does not serve. MissingDependencyError: there is no vLLM.
    """
    if options.engine == "saffron":
        if options.vllm:
            raise ConfigError("--vllm: works with --engine vllm")
        return
    if getattr(options, "capture", False):
        raise ConfigError("--capture: works with --engine saffron; vLLM has CUDA graphs of its own")
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError("vllm", "vllm")
    for name, value in (
        ("SAFFRON_VLLM", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"), ("VLLM_LOGGING_LEVEL", "ERROR")
    ):  # fmt: skip
        os.environ.setdefault(name, value)


def engine(options: argparse.Namespace) -> dict[str, Any]:
    """`policy_class` and `policy_options` of `ModelFiles`; imports vLLM, if that is asked for. After `check_engine`."""
    if options.engine == "saffron":
        return {}
    from saffron.integrations.vllm.policy import VllmPolicy

    return {"policy_class": VllmPolicy, "policy_options": tuple(options.vllm)}


def check_models(options: argparse.Namespace) -> None:
    """Says what is wrong with checkpoints and device before anything is loaded.

    Raises:
        CheckpointError, ConfigError: no such folder, no such device.
    """
    from saffron.models.devices import find_device
    from saffron.models.text_rewards import check_reward

    for option in ("policy", "mrm", "base", "prm", "reward", "tokenizer"):
        given = getattr(options, option, None)
        check = check_reward if option in ("prm", "reward") else check_checkpoint
        check(f"--{option}", given if isinstance(given, str) else None)  # True: the bundled one
    find_device(getattr(options, "device", None))


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `SearchConfig`, which checks them."""
    default = SearchConfig()
    group = parser.add_argument_group("search")
    add = group.add_argument
    add("--width", type=whole(-MOST), default=default.width, metavar="N", help="beams kept")
    add("--top-p", type=number, default=default.top_p, metavar="P", help="probability mass of the nucleus")
    add(
        "--max-new-tokens", type=whole(-MOST), default=default.max_new_tokens, metavar="N",
        help="longest answer, without the prefill",
    )  # fmt: skip
    add(
        "--min-new-tokens", type=whole(-MOST), default=default.min_new_tokens, metavar="N",
        help="tokens before an answer may end",
    )  # fmt: skip
    add("--ranking", choices=get_args(Ranking), default=default.ranking, help="how unfinished and finished beams rank")
    add("--eos-score", choices=get_args(EosScore), default=default.eos_score, help="score of a beam that ends")
    add(
        "--unseen-reward", type=number, default=default.unseen_reward, metavar="REWARD",
        help="reward of tokens that the MRM was never trained on",
    )  # fmt: skip
    add("--preset", choices=[*PRESETS], default="paper", help="settings that the options below replace")
    add("--temperature", type=number, metavar="T", help="divides the policy's logits")
    add("--min-p", type=number, metavar="P", help="least probability of a candidate, as a share of the largest")
    add("--top-k", type=whole(-MOST), metavar="K", help="most candidates per beam; 0: all of the nucleus")
    add("--reward-cap", type=number, metavar="REWARD", help="rewards above it count as this")
    add("--reward-tolerance", type=number, metavar="STEP", help="rewards are rounded down to multiples of it; 0: not")
    add("--policy-weight", type=number, metavar="W", help="times the log-probability, added to the reward")
    add("--policy-score", choices=get_args(PolicyScore), help="whose log-probability: mean of the path, or the token's")
    add("--path-score", choices=get_args(PathScore), help="reward of a response, from those of its tokens")
    add("--discount", type=number, metavar="D", help="of the reward so far, with --path-score discounted")
    add("--commit-every", type=whole(-MOST), metavar="STEPS", help="keep only the best beam after so many; 0: never")
    add("--no-lm-head-bias", dest="lm_head_bias", action="store_false", help="leave out the trained bias of the MRM")


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Where the work is done; `workers` reads them."""
    group = parser.add_argument_group("workers")
    group.add_argument(
        "--workers", type=whole(1, 4096), metavar="N",
        help="processes (default: 1; with --ray one per GPU or, without GPUs, one per CPU)",
    )  # fmt: skip
    group.add_argument(
        "--ray", nargs="?", const="auto", metavar="ADDRESS", help='a running Ray cluster; "local" starts one here'
    )
    group.add_argument("--threads", type=whole(1, 4096), default=1, metavar="N", help="CPU threads of each worker")


def workers(options: argparse.Namespace) -> Workers:
    from saffron.workers import Workers

    return Workers(options.workers or 0, options.ray, options.threads)


def search_config(options: argparse.Namespace) -> SearchConfig:
    given = {name: getattr(options, name) for name in SearchConfig.__dataclass_fields__}
    named = {name: value for name, value in given.items() if value is not None}
    config = SearchConfig.preset(options.preset, **named)
    check_lengths(config)
    return config


def check_prompt(where: str, prompt: object, prefill: object) -> tuple[str, str]:
    """A prompt and a prefill that are text. Raises `ConfigError`."""
    if not isinstance(prompt, str) or not isinstance(prefill, str):
        raise ConfigError(f'{where} needs a text "prompt" and may have one "prefill"')
    if not prompt:
        raise ConfigError(f"{where}: prompt: got '', expected a text")
    return check_text(f"{where}: prompt", prompt), check_text(f"{where}: prefill", prefill)
