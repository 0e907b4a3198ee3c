"""`saffron annotate`."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from saffron.cli.options import (
    DEVICE_HELP,
    Commands,
    above_zero,
    add_worker_options,
    check_models,
    name,
    path,
    positive,
    words,
    workers,
)
from saffron.cli.progress import progress
from saffron.storage.paths import check_output_folder

if TYPE_CHECKING:
    from saffron.training.annotate import AnnotateConfig


def add(commands: Commands) -> None:
    annotate = commands.add_parser(
        "annotate",
        help="have a guard, or anything that scores text, reward every prefix of a corpus, for `saffron train-mrm`",
        description="Rewards of every prefix of every conversation, as Parquet shards. Run it again after an "
        "interruption: what is there is kept.",
    )
    annotate.add_argument(
        "corpus",
        type=name,
        help='JSON lines with "prompt" and "response" or with "messages"; or a data set: a folder or a hub name',
    )
    annotate.add_argument("--output", type=path, required=True, metavar="DIR", help="folder to write")
    _add_reward(annotate)
    annotate.add_argument("--split", type=words, default="train", metavar="NAME", help="split of a data set")
    annotate.add_argument(
        "--fields",
        nargs="+",
        type=words,
        default=["chosen"],
        metavar="NAME",
        help="columns of a data set that hold transcripts",
    )
    annotate.add_argument("--limit", type=positive, metavar="N", help="only the first N conversations")
    annotate.add_argument(
        "--prefixes",
        choices=("conversation", "response"),
        help="which prefixes get a reward: those that end anywhere in the conversation, as in the paper's loss, or in "
        "a response, all a search asks for (default: conversation for a guard, response for another reward)",
    )
    annotate.add_argument(
        "--max-tokens", type=positive, default=128, metavar="N", help="conversations are cut to so many tokens"
    )
    annotate.add_argument("--batch", type=positive, default=8, metavar="N", help="conversations per forward pass")
    annotate.add_argument("--shard-size", type=positive, default=256, metavar="N", help="conversations per file")
    annotate.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the guard (default: float32 on a CPU, else the checkpoint's own)",
    )
    annotate.add_argument("--device", metavar="DEVICE", help=DEVICE_HELP)
    annotate.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_worker_options(annotate)
    annotate.set_defaults(run=run)


def _add_reward(annotate: argparse.ArgumentParser) -> None:
    what = annotate.add_mutually_exclusive_group()
    what.add_argument(
        "--prm", type=name, metavar="CHECKPOINT", help="checkpoint of the guard (default: the bundled one)"
    )
    what.add_argument(
        "--reward",
        type=name,
        metavar="REWARD",
        help="guard:CHECKPOINT; hf:CHECKPOINT#LABEL, a sequence classifier and the label that is wanted (#!LABEL: that "
        "is not); or module:function, which is given conversations and responses and returns a number for each",
    )
    annotate.add_argument(
        "--tokenizer",
        type=name,
        metavar="CHECKPOINT",
        help="whose tokenizer the MRM will have, its base: needed for a reward that is no guard",
    )
    annotate.add_argument(
        "--scale", type=above_zero, default=1.0, metavar="X", help="rewards are multiplied by it (default %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    from saffron.models.bundled import FOLDER
    from saffron.training.annotate import annotate
    from saffron.training.conversations import read_corpus

    config, places = annotate_config(options), workers(options)
    check_models(options)
    check_output_folder("--output", options.output)
    conversations = read_corpus(options.corpus, split=options.split, fields=options.fields, limit=options.limit)
    began, done = time.monotonic(), {"conversations": len(conversations), "seen": 0, "found": 0, "rewards": 0}
    with progress("annotating") as show:

        def count(new_conversations: int, new_rewards: int) -> None:
            if not new_rewards and not done["rewards"]:
                done["found"] = new_conversations
            done["rewards"] += new_rewards
            done["seen"] += new_conversations
            show(done["seen"], len(conversations), f"{done['rewards'] / (time.monotonic() - began):.0f} rewards/s")

        annotate(
            conversations,
            options.reward or options.prm or str(FOLDER / "guard"),
            options.output,
            config,
            places,
            tokenizer=options.tokenizer,
            source=options.corpus,
            progress=count,
        )
    _report(options, done, time.monotonic() - began)
    return 0


def annotate_config(options: argparse.Namespace) -> AnnotateConfig:
    from saffron.models.text_rewards import is_text_reward
    from saffron.training.annotate import AnnotateConfig

    values = {name: getattr(options, name) for name in AnnotateConfig.__dataclass_fields__}
    if values["prefixes"] is None:
        values["prefixes"] = "response" if options.reward and is_text_reward(options.reward) else "conversation"
    return AnnotateConfig(**values)


def _report(options: argparse.Namespace, done: dict[str, Any], seconds: float) -> None:
    rate = done["rewards"] / seconds
    if options.json:
        print(json.dumps({"out": str(options.output), **done, "seconds": seconds, "rewards_per_second": rate}))
        return
    kept = f" ({done['found']} were there already)" if done["found"] else ""
    print(f"{options.output}: {done['conversations']} conversations{kept}")
    print(f"{done['rewards']} rewards in {seconds:.1f} s, {rate:.0f} a second")
