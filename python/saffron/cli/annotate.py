"""`saffron annotate`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saffron.cli.options import Commands, add_worker_options, positive, workers


def add(commands: Commands) -> None:
    annotate = commands.add_parser(
        "annotate",
        help="have a guard (PRM) reward every prefix of a corpus, for `saffron train-mrm`",
        description="Rewards of every prefix of every conversation, as Parquet shards. Run it again after an "
        "interruption: what is there is kept.",
    )
    annotate.add_argument(
        "corpus",
        help='JSON lines with "prompt" and "response" or with "messages"; or a data set: a folder or a hub name',
    )
    annotate.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    annotate.add_argument("--prm", help="checkpoint of the guard (default: the bundled one)")
    annotate.add_argument("--split", default="train", help="of a data set (default %(default)s)")
    annotate.add_argument(
        "--fields", nargs="+", default=["chosen"], help="columns of a data set that hold transcripts (%(default)s)"
    )
    annotate.add_argument("--limit", type=positive, metavar="N", help="only the first N conversations")
    annotate.add_argument(
        "--prefixes",
        default="conversation",
        choices=("conversation", "response"),
        help="which prefixes get a reward: those that end anywhere in the conversation, as in the paper's loss, or in "
        "a response, all a search asks for (default %(default)s)",
    )
    annotate.add_argument(
        "--max-tokens", type=positive, default=128, help="conversations are cut to so many (default %(default)s)"
    )
    annotate.add_argument(
        "--batch", type=positive, default=8, help="conversations a forward pass (default %(default)s)"
    )
    annotate.add_argument("--shard-size", type=positive, default=256, help="conversations a file (default %(default)s)")
    annotate.add_argument("--dtype", help="of the guard: float32, bfloat16 or float16 (default: float32 on a CPU)")
    annotate.add_argument("--device", help="e.g. cpu or cuda (default: the GPU if there is one)")
    annotate.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_worker_options(annotate)
    annotate.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from saffron.models.bundled import FOLDER
    from saffron.training.annotate import AnnotateConfig, annotate
    from saffron.training.conversations import read_corpus

    config = AnnotateConfig(**{name: getattr(options, name) for name in AnnotateConfig.__dataclass_fields__})
    places = workers(options)
    conversations = read_corpus(options.corpus, split=options.split, fields=options.fields, limit=options.limit)
    began, done = time.monotonic(), {"conversations": len(conversations), "found": 0, "rewards": 0}
    with _progress(len(conversations)) as advance:

        def count(new_conversations: int, new_rewards: int) -> None:
            if not new_rewards and not done["rewards"]:
                done["found"] = new_conversations
            done["rewards"] += new_rewards
            advance(new_conversations, done["rewards"] / (time.monotonic() - began))

        prm = options.prm or str(FOLDER / "guard")
        annotate(conversations, prm, options.out, config, places, source=options.corpus, progress=count)
    _report(options, done, time.monotonic() - began)
    return 0


def _report(options: argparse.Namespace, done: dict[str, Any], seconds: float) -> None:
    rate = done["rewards"] / seconds
    if options.json:
        print(json.dumps({"out": str(options.out), **done, "seconds": seconds, "rewards_per_second": rate}))
        return
    kept = f" ({done['found']} were there already)" if done["found"] else ""
    print(f"{options.out}: {done['conversations']} conversations{kept}")
    print(f"{done['rewards']} rewards in {seconds:.1f} s, {rate:.0f} a second")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, float], None]]:
    """A bar on stderr; yields what to call with conversations done and rewards a second."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("annotating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} rewards/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, rate=0.0)
        yield lambda count, rate: progress.update(task, advance=count, rate=rate)
