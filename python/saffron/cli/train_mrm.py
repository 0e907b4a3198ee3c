"""`saffron train-mrm`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saffron.cli.options import Commands, positive
from saffron.cli.progress import progress

if TYPE_CHECKING:
    from saffron.training.train import TrainConfig


def add(commands: Commands) -> None:
    train = commands.add_parser(
        "train-mrm",
        help="train a multifurcation reward model on what `saffron annotate` wrote",
        description="LoRA factors and a bias of the unembedding, by partial supervision. Run it again after an "
        "interruption: it goes on at its last checkpoint. Several devices: accelerate launch -m saffron.cli train-mrm",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument("data", type=Path, help="folder of `saffron annotate`")
    train.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the MRM, published format")
    train.add_argument("--base", default=argparse.SUPPRESS, help="the guard (default: the one that made the data)")
    train.add_argument(
        "--run", dest="run_folder", type=Path, default=argparse.SUPPRESS, metavar="DIR",
        help="folder for checkpoint, log and pictures (default: OUT/training)",
    )  # fmt: skip
    train.add_argument(
        "--heldout", type=Path, default=argparse.SUPPRESS, metavar="DIR",
        help="annotated conversations to evaluate on (default: a share of the data)",
    )  # fmt: skip
    train.add_argument("--device", default=argparse.SUPPRESS, help="cpu keeps it off the GPU")
    train.add_argument("--threads", type=positive, default=argparse.SUPPRESS, help="CPU threads (default: PyTorch's)")
    train.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the summary as JSON")
    _add_hyperparameters(train)
    train.set_defaults(run=run)


def _add_hyperparameters(train: argparse.ArgumentParser) -> None:
    """One option for each field of `TrainConfig`, which checks them."""
    group = train.add_argument_group("hyperparameters")
    add = group.add_argument
    add("--epochs", type=int, default=1, help="passes over the corpus")
    add("--batch", type=int, default=4, help="conversations a step, over all devices")
    add("--lr", type=float, default=1e-4, help="learning rate of AdamW")
    add("--weight-decay", type=float, default=0.0, help="of AdamW")
    add("--beta1", type=float, default=0.9, help="of AdamW")
    add("--beta2", type=float, default=0.999, help="of AdamW")
    add("--eps", type=float, default=1e-8, help="of AdamW")
    add("--schedule", default="constant", help="of the learning rate: constant, cosine or linear")
    add("--warmup", type=int, default=0, help="steps over which the learning rate rises")
    add("--clip", type=float, default=1.0, help="greatest norm of the gradient, 0 for any")
    add("--rank", type=int, default=4, help="of the LoRA factors")
    add("--alpha", type=int, default=4, help="of the LoRA factors")
    add("--dropout", type=float, default=0.0, help="of the LoRA factors")
    add("--target-modules", nargs="+", default=["q_proj", "v_proj"], help="layers that get LoRA factors")
    add("--no-bias", dest="train_bias", action="store_false", help="leave the bias of the unembedding at zero")
    add("--heldout-share", type=float, default=0.02, help="of the conversations, without --heldout")
    add("--dtype", default="float32", help="of the frozen weights: float32 or bfloat16")
    add("--mixed-precision", default="no", help="no or bf16")
    add("--seed", type=int, default=0, help="of the first LoRA factors and the order")
    add("--checkpoint-every", type=int, default=200, help="steps")
    add("--evaluate-every", type=int, default=200, help="steps")


def run(options: argparse.Namespace) -> int:
    import torch

    from saffron.training.shards import read_rewards
    from saffron.training.train import Trainer
    from saffron.workers import torch_threads

    config = train_config(options)
    data = read_rewards(options.data)
    heldout = read_rewards(options.heldout) if "heldout" in options else None
    base = getattr(options, "base", None) or data.manifest["prm"]["source"]
    with torch_threads(getattr(options, "threads", None) or torch.get_num_threads()):
        trainer = Trainer(
            base,
            data,
            options.output,
            config,
            run=getattr(options, "run_folder", None),
            heldout=heldout,
            device=getattr(options, "device", None),
        )
        with progress("training") as show:
            trainer.train(lambda step, text: show(step, len(trainer.order), text))
    if trainer.accelerator.is_main_process:
        _report(trainer.run / "summary.json", options)
    return 0


def train_config(options: argparse.Namespace) -> TrainConfig:
    from saffron.training.train import TrainConfig

    values = {name: getattr(options, name) for name in TrainConfig.__dataclass_fields__}
    return TrainConfig(**values | {"target_modules": tuple(options.target_modules)})


def _report(file: Path, options: argparse.Namespace) -> None:
    summary: dict[str, Any] = json.loads(file.read_text())
    if "json" in options:
        print(json.dumps({"out": str(options.output), **summary}))
        return
    print(f"{options.output}: {summary['steps']} steps on {summary['rewards']} rewards")
    print(f"{summary['unseen']} of {summary['vocabulary']} tokens are unseen")
    if found := summary["heldout"]:
        print(f"held out: {found['within_1']:.3f} within 1, correlation {found['correlation']:.3f}")
    print(f"log and pictures: {file.parent}")
