"""`saffron train-mrm`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saffron.cli.options import MOST, Commands, check_models, name, number, path, seed, whole, words
from saffron.cli.progress import progress
from saffron.errors import ConfigError
from saffron.storage.paths import check_output_folder

if TYPE_CHECKING:
    from saffron.training.shards import RewardData
    from saffron.training.train import TrainConfig


def add(commands: Commands) -> None:
    train = commands.add_parser(
        "train-mrm",
        help="train a multifurcation reward model on what `saffron annotate` wrote",
        description="LoRA factors and a bias of the unembedding, by partial supervision. Run it again after an "
        "interruption: it goes on at its last checkpoint. Several devices: accelerate launch -m saffron.cli train-mrm",
    )
    add = train.add_argument
    add("data", type=path, metavar="DIR", help="folder of `saffron annotate`")
    add("--output", type=path, required=True, metavar="DIR", help="folder for the MRM, published format")
    add(
        "--base", type=name, metavar="CHECKPOINT",
        help="the MRM's trunk, of the tokenizer that the data were annotated for: the guard, or the policy itself "
        "(default: the guard that made the data, or the checkpoint of --tokenizer)",
    )  # fmt: skip
    add(
        "--trunk", choices=("lora", "frozen"), default="lora",
        help="lora: as published; frozen: the base as it is and an unembedding learned from its hidden states, in "
        "minutes (it has --epochs, --batch, --lr, --weight-decay, --rank, --heldout-share and --seed, with defaults of "
        "its own)",
    )  # fmt: skip
    add(
        "--run", dest="run_folder", type=path, metavar="DIR",
        help="folder for checkpoint, log and pictures (default: training in the output folder)",
    )  # fmt: skip
    add(
        "--heldout", type=path, metavar="DIR",
        help="annotated conversations to evaluate on (default: a share of the data)",
    )  # fmt: skip
    add("--device", metavar="DEVICE", help="cpu or cuda (default: the GPU if there is one)")
    add("--threads", type=whole(1, 4096), metavar="N", help="CPU threads (default: PyTorch's)")
    add("--json", action="store_true", help="print the summary as JSON")
    _add_hyperparameters(train)
    train.set_defaults(run=run)


def _add_hyperparameters(train: argparse.ArgumentParser) -> None:
    """One option for each field of `TrainConfig`, which checks them."""
    group = train.add_argument_group("hyperparameters")

    def add(option: str, type: Callable[[str], Any], default: Any, help: str) -> None:
        metavar = "X" if type is number else "NAME" if type is words else "N"
        many = isinstance(default, list)
        group.add_argument(option, type=type, default=default, metavar=metavar, help=help, nargs="+" if many else None)

    count = whole(-MOST)
    add("--epochs", count, 1, "passes over the corpus")
    add("--batch", count, 4, "conversations per step, over all devices")
    add("--lr", number, 1e-4, "learning rate of AdamW")
    add("--weight-decay", number, 0.0, "weight decay of AdamW")
    add("--beta1", number, 0.9, "decay of AdamW's mean of gradients")
    add("--beta2", number, 0.999, "decay of AdamW's mean of squared gradients")
    add("--eps", number, 1e-8, "added to AdamW's denominator")
    add("--warmup", count, 0, "steps over which the learning rate rises")
    add("--clip", number, 1.0, "greatest norm of the gradient, 0 for any")
    add("--rank", count, 4, "rank of the LoRA factors")
    add("--alpha", count, 4, "the LoRA factors are scaled by alpha/rank")
    add("--dropout", number, 0.0, "share of the LoRA factors' inputs that is dropped")
    add("--target-modules", words, ["q_proj", "v_proj"], "layers that get LoRA factors")
    add("--heldout-share", number, 0.02, "share of the conversations that is held out, without --heldout")
    add("--seed", seed, 0, "decides the first LoRA factors and the order of the corpus")
    add("--checkpoint-every", count, 200, "steps between checkpoints")
    add("--evaluate-every", count, 200, "steps between evaluations on what is held out")
    group.add_argument(
        "--schedule", choices=("constant", "cosine", "linear"), default="constant", help="of the learning rate"
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    group.add_argument("--mixed-precision", choices=("no", "bf16"), default="no", help="of the forward passes")
    group.add_argument(
        "--no-bias", dest="train_bias", action="store_false", help="leave the bias of the unembedding at zero"
    )


def run(options: argparse.Namespace) -> int:
    import torch

    from saffron.training.shards import read_rewards
    from saffron.training.train import Trainer
    from saffron.workers import torch_threads

    if options.trunk == "frozen":
        return _run_frozen(options)
    config = train_config(options)
    check_models(options)
    check_output_folder("--output", options.output)
    data = read_rewards(options.data)
    heldout = read_rewards(options.heldout) if options.heldout else None
    base = options.base or default_base(data)
    with torch_threads(options.threads or torch.get_num_threads()):
        trainer = Trainer(
            base,
            data,
            options.output,
            config,
            run=options.run_folder,
            heldout=heldout,
            device=options.device,
        )
        with progress("training") as show:
            trainer.train(lambda step, text: show(step, len(trainer.order), text))
    if trainer.accelerator.is_main_process:
        _report(trainer.run / "summary.json", options)
    return 0


def _run_frozen(options: argparse.Namespace) -> int:
    import torch

    from saffron.training.head import SUMMARY, HeadConfig, train_head
    from saffron.training.shards import read_rewards
    from saffron.workers import torch_threads

    if options.heldout:
        raise ConfigError("--heldout: works with --trunk lora; --heldout-share sets conversations aside")
    defaults = vars(_defaults())
    given = {name: getattr(options, name) for name, value in defaults.items() if getattr(options, name) != value}
    for option in given:
        if option not in HeadConfig.__dataclass_fields__:
            raise ConfigError(f"--{option.replace('_', '-')}: works with --trunk lora")
    config = HeadConfig(**given)
    check_models(options)
    check_output_folder("--output", options.output)
    data = read_rewards(options.data)
    run = options.run_folder or options.output / "training"
    with torch_threads(options.threads or torch.get_num_threads()), progress("reading the corpus") as show:
        train_head(
            options.base or default_base(data), data, options.output, config,
            run=run, device=options.device, progress=show,
        )  # fmt: skip
    _report(run / SUMMARY, options)
    return 0


def _defaults() -> argparse.Namespace:
    """What the options are if nobody sets them."""
    parser = argparse.ArgumentParser()
    _add_hyperparameters(parser)
    return parser.parse_args([])


def default_base(data: RewardData) -> str:
    """The checkpoint whose tokenizer the data are in: their guard, or what `annotate --tokenizer` named."""
    return str(data.manifest.get("base") or data.manifest["prm"]["source"])


def train_config(options: argparse.Namespace) -> TrainConfig:
    from saffron.training.train import TrainConfig

    values = {name: getattr(options, name) for name in TrainConfig.__dataclass_fields__}
    return TrainConfig(**values | {"target_modules": tuple(options.target_modules)})


def _report(file: Path, options: argparse.Namespace) -> None:
    summary: dict[str, Any] = json.loads(file.read_text())
    if options.json:
        print(json.dumps({"out": str(options.output), **summary}))
        return
    print(f"{options.output}: {summary['steps']} steps on {summary['rewards']} rewards")
    print(f"{summary['unseen']} of {summary['vocabulary']} tokens are unseen")
    if found := summary["heldout"]:
        correlation = found["correlation"]  # None where one of the two is constant
        shown = "undefined" if correlation is None else f"{correlation:.3f}"
        print(f"held out: {found['within_1']:.3f} within 1, correlation {shown}")
    print(f"{'log and pictures' if options.trunk == 'lora' else 'hidden states'}: {file.parent}")
