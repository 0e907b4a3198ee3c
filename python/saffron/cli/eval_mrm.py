"""`saffron eval-mrm`."""

from __future__ import annotations

import argparse
import itertools
import json
from typing import TYPE_CHECKING

from saffron.cli.options import Commands, add_model_options, check_models, name, number, path, positive
from saffron.cli.progress import progress
from saffron.storage.folders import check_replaceable

if TYPE_CHECKING:
    from saffron.training.agreement import Agreement
    from saffron.training.evaluate import Evaluation


def add(commands: Commands) -> None:
    evaluation = commands.add_parser(
        "eval-mrm",
        help="hold a multifurcation reward model against its guard",
        description="Predicted against true rewards on what `saffron annotate` wrote: share within 1, correlation, "
        "errors by depth in the turn, and what the unseen mask excludes.",
    )
    add = evaluation.add_argument
    add("data", type=path, metavar="DIR", help="folder of `saffron annotate`")
    add(
        "--turns", default="responses", choices=("responses", "all"),
        help="whose words: those of responses, all a search asks for, or users' too",
    )  # fmt: skip
    add("--limit", type=positive, metavar="N", help="only the first N conversations")
    add(
        "--policy", type=name, nargs="?", const=True, metavar="CHECKPOINT",
        help="also how much of this policy's nucleus is unseen (without a value: of the bundled policy)",
    )  # fmt: skip
    add("--top-p", type=number, default=0.8, metavar="P", help="probability mass of the nucleus")
    add("--plot", type=path, metavar="FILE", help="picture of predicted against true rewards")
    add("--plot-depth", type=path, metavar="FILE", help="picture of the errors by depth in the turn")
    add("--json", action="store_true", help="print the figures as JSON")
    add_model_options(evaluation, "mrm", "base")
    evaluation.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from saffron.models.files import ModelFiles
    from saffron.training import plots
    from saffron.training.evaluate import evaluate, nucleus_on_unseen, predict
    from saffron.training.shards import read_rewards

    check_models(options)
    for option in ("plot", "plot_depth"):
        if file := getattr(options, option):
            check_replaceable(f"--{option.replace('_', '-')}", file, plots.MARK)
    rows = read_rewards(options.data).rows[: options.limit]
    named = None if options.policy is True else options.policy
    models = ModelFiles(named, options.mrm, options.base, device=options.device)
    mrm = models.load_mrm()
    policy = None if options.policy is None else models.load_policy()
    with progress("evaluating") as show:
        passes = itertools.count(1)
        total = len(rows) * (1 if policy is None else 2)

        def advance(_: int) -> None:
            show(next(passes), total)

        predictions = predict(mrm, rows, options.turns, advance)
        nucleus = None if policy is None else nucleus_on_unseen(policy, mrm, rows, options.top_p, advance)
    found = evaluate(predictions, mrm, nucleus)
    if options.plot:
        plots.scatter(options.plot, predictions.known.predicted, predictions.known.true)
    if options.plot_depth:
        plots.calibration(options.plot_depth, found.by_depth)
    print(json.dumps(found.to_json()) if options.json else _text(found))
    return 0


def _text(found: Evaluation) -> str:
    header = f"{'':>12} {'tokens':>8} {'within 1':>9} {'correlation':>12} {'mean error':>11} {'rms error':>10}"
    table = [header, _row("known", found.known)]
    table += [
        _row(f"{first}" if first == last else f"{first} to {last}", one)
        for (first, last), one in found.by_depth.items()
    ]
    tokens = found.known.tokens + found.unseen.tokens
    lines = ["rewards of next tokens, MRM against guard, known tokens by their place in the turn", *table]
    lines.append(f"unseen: {found.vocabulary_unseen} of {found.vocabulary} tokens of the vocabulary,")
    lines.append(f"  {found.unseen.tokens} of the {tokens} tokens here")
    if found.unseen.tokens:
        lines.append(f"  ({found.unseen.within_1:.3f} within 1, rms error {found.unseen.root_mean_square_error:.3f})")
    if one := found.nucleus:
        lines.append(
            f"policy, nucleus of {one.top_p:g}, {one.positions} positions: {one.mass:.2%} of its mass is unseen,"
        )
        lines.append(f"  {one.some:.2%} of the positions have an unseen candidate, {one.only:.2%} no other")
    return "\n".join(lines)


def _row(name: str, one: Agreement) -> str:
    return (
        f"{name:>12} {one.tokens:>8} {one.within_1:>9.3f} {one.correlation:>12.3f} {one.mean_error:>11.3f} "
        f"{one.root_mean_square_error:>10.3f}"
    )
