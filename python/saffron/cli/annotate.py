"""`saffron annotate`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saffron.cli.options import Commands, add_worker_options, positive, workers
from saffron.cli.progress import progress

if TYPE_CHECKING:
    from saffron.training.annotate import AnnotateConfig


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
    annotate.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
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
    from saffron.training.annotate import annotate
    from saffron.training.conversations import read_corpus

    config, places = annotate_config(options), workers(options)
    conversations = read_corpus(options.corpus, split=options.split, fields=options.fields, limit=options.limit)
    began, done = time.monotonic(), {"conversations": len(conversations), "seen": 0, "found": 0, "rewards": 0}
    with progress("annotating") as show:

        def count(new_conversations: int, new_rewards: int) -> None:
            if not new_rewards and not done["rewards"]:
                done["found"] = new_conversations
            done["rewards"] += new_rewards
            done["seen"] += new_conversations
            show(done["seen"], len(conversations), f"{done['rewards'] / (time.monotonic() - began):.0f} rewards/s")

        prm = options.prm or str(FOLDER / "guard")
        annotate(conversations, prm, options.output, config, places, source=options.corpus, progress=count)
    _report(options, done, time.monotonic() - began)
    return 0


def annotate_config(options: argparse.Namespace) -> AnnotateConfig:
    from saffron.training.annotate import AnnotateConfig

    return AnnotateConfig(**{name: getattr(options, name) for name in AnnotateConfig.__dataclass_fields__})


def _report(options: argparse.Namespace, done: dict[str, Any], seconds: float) -> None:
    rate = done["rewards"] / seconds
    if options.json:
        print(json.dumps({"out": str(options.output), **done, "seconds": seconds, "rewards_per_second": rate}))
        return
    kept = f" ({done['found']} were there already)" if done["found"] else ""
    print(f"{options.output}: {done['conversations']} conversations{kept}")
    print(f"{done['rewards']} rewards in {seconds:.1f} s, {rate:.0f} a second")
