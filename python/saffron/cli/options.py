"""What several commands share: options of the search, JSON lines."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saffron.errors import ConfigError
from saffron.search.config import SearchConfig

if TYPE_CHECKING:
    from saffron.workers import Workers

Commands = Any  # what `add_subparsers` returns: argparse has no public name for it


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `SearchConfig`, which checks them."""
    default = SearchConfig()
    group = parser.add_argument_group("search")
    group.add_argument("--width", type=int, default=default.width, help="beams kept (default %(default)s)")
    group.add_argument("--top-p", type=float, default=default.top_p, help="nucleus mass (default %(default)s)")
    group.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="(default %(default)s)")
    group.add_argument("--min-new-tokens", type=int, default=default.min_new_tokens, help="(default %(default)s)")
    group.add_argument("--ranking", default=default.ranking, help="paper or released (default %(default)s)")
    group.add_argument("--eos-score", default=default.eos_score, help="parent or mrm (default %(default)s)")
    group.add_argument("--unseen-reward", type=float, default=default.unseen_reward, help="(default %(default)s)")
    group.add_argument(
        "--no-lm-head-bias", dest="lm_head_bias", action="store_false", help="leave out the trained bias of the MRM"
    )


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Where the work is done; `workers` reads them."""
    group = parser.add_argument_group("workers")
    group.add_argument(
        "--workers", type=positive, help="processes (default: 1; with --ray one a GPU or, without GPUs, one a CPU)"
    )
    group.add_argument(
        "--ray", nargs="?", const="auto", metavar="ADDRESS", help='a running Ray cluster; "local" starts one here'
    )
    group.add_argument("--threads", type=positive, default=1, help="CPU threads of each worker (default %(default)s)")


def workers(options: argparse.Namespace) -> Workers:
    from saffron.workers import Workers

    return Workers(options.workers or 0, options.ray, options.threads)


def search_config(options: argparse.Namespace) -> SearchConfig:
    return SearchConfig(**{name: getattr(options, name) for name in SearchConfig.__dataclass_fields__})


def json_lines(file: Path) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON lines ({error})") from error
    if not all(isinstance(record, dict) for record in records):
        raise ConfigError(f"{file}: every line must be a JSON object")
    return records


def positive(text: str) -> int:
    value = int(text) if text.lstrip("-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return value
