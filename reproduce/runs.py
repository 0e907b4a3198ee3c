"""The runs behind docs/results.md: which methods, at which budgets, against what. `results_page` writes them up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from saffron.evaluation.choices import expand
from saffron.evaluation.datasets import load_cases
from saffron.evaluation.metrics import Curve, curves, group
from saffron.evaluation.run import Plan, run_plans
from saffron.evaluation.store import Record, read_results
from saffron.models.files import ModelFiles
from saffron.workers import Workers

JUDGE, ATTACK = "oracle", "prefill:10"
NUCLEUS, WIDE = "top_p=0.8", "top_p=0.95"  # the paper's, and one that leaves the policy's grammar whole (see page)
BASELINES = ("beam", "rebase", "deal", "mcts")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run.

    Attributes:
        prompts, tuning: prompts of every figure, and those that hyperparameters are chosen on.
        timed: prompts whose wall time is taken.
        budgets, wide: by method, of the sweeps in the paper's nucleus and in the wider one.
        with_mrm: the same, of methods with the MRM in the PRM's place.
        candidates: hyperparameters to choose from.
        more: samples of Best-of-N beyond the sweep, to compare with what is dearer.
        children, lookahead: whose scaling efficiency is shown.
        lengths: of the prefill.
        corpus: conversations that an MRM is trained on, to show that the commands do it.
    """

    prompts: int
    tuning: int
    timed: int
    budgets: dict[str, str]
    wide: dict[str, str]
    with_mrm: dict[str, str]
    candidates: dict[str, tuple[str, ...]]
    more: str
    children: str
    lookahead: str
    lengths: str
    corpus: int


FULL = Scale(
    prompts=200,
    tuning=60,
    timed=20,
    budgets={
        "saffron": "width=1/2/4/8/16/32/64",
        "best-of-n": "n=1/2/4/8/16/32/64",
        "beam": "width=1/2/4",
        "rebase": "width=2/4/8/16/32/64",
        "deal": "width=1/2/4",
        "mcts": "simulations=2/4/8/16/32/64",
    },
    wide={
        "saffron": "width=4/16/32",
        "best-of-n": "n=8/32",
        "beam": "width=2",
        "rebase": "width=32",
        "deal": "width=2",
        "mcts": "simulations=16",
    },
    with_mrm={"best-of-n": "n=4/16/64", "mcts": "simulations=4/16/64"},
    candidates={
        "beam": ("children=2/4/8/16,step_tokens=1", "children=4/8,step_tokens=4"),
        "rebase": ("balance=0.2/1/4,step_tokens=1/4/8",),
        "deal": ("children=8/16,lookahead=0/4/8/16",),
        "mcts": ("children=4/8/16,lookahead=0/4,exploration=1", "children=16,lookahead=0,exploration=0.3/3"),
    },
    more="128",
    children="2/4/8/16",
    lookahead="0/2/4/8",
    lengths="0/2/4/10/16/32",
    corpus=1500,
)
QUICK = Scale(
    prompts=4,
    tuning=2,
    timed=2,
    budgets={
        "saffron": "width=1/4/16",
        "best-of-n": "n=4/32",
        "beam": "width=1/2",
        "rebase": "width=4/16",
        "deal": "width=1",
        "mcts": "simulations=2/4",
    },
    wide={
        "saffron": "width=4/16",
        "best-of-n": "n=32",
        "beam": "width=1",
        "rebase": "width=4",
        "deal": "width=1",
        "mcts": "simulations=2",
    },
    with_mrm={"best-of-n": "n=4", "mcts": "simulations=2"},
    candidates={
        "beam": ("children=2/8,step_tokens=1",),
        "rebase": ("balance=1,step_tokens=4/8",),
        "deal": ("children=8,lookahead=0/4",),
        "mcts": ("children=8,lookahead=0/4,exploration=1",),
    },
    more="64",
    children="2/4",
    lookahead="0/2",
    lengths="0/10",
    corpus=60,
)
TUNED_AT = {  # budgets that candidates are tried at: on both sides of Best-of-32's compute where they can be
    "beam": "width=1/4",
    "rebase": "width=8/32",
    "deal": "width=1/2",
    "mcts": "simulations=4/16",
}


@dataclass(frozen=True, slots=True)
class Results:
    """What was found: results of the prompts that figures are of, of the tuning, and of the timing; the choices."""

    main: list[Record]
    tuning: list[Record]
    timing: list[Record]
    chosen: dict[str, str]


def run_all(scale: Scale, out: Path, workers: Workers, progress: Progress) -> Results:
    """Runs what is not there yet, into JSON lines under a folder."""
    main, tuning, timing = (out / f"{name}.jsonl" for name in ("results", "tuning", "timing"))

    def run(title: str, plans: Sequence[Plan], file: Path, where: Workers = workers) -> list[Record]:
        return run_plans(plans, file, where, progress=lambda done, total: progress(title, done, total))

    tried = run("choosing hyperparameters", [tuning_plan(scale)], tuning)
    chosen = choose(tried)
    run("attacking", main_plans(scale, chosen), main)
    run("no unseen mask", [unmasked_plan(scale)], main)
    alone = Workers(1, None, workers.threads)  # nothing else runs while times are taken
    run("taking times", timing_plans(scale, ""), timing, alone)
    run("without the trie cache", timing_plans(scale, "no trie cache"), timing, alone)
    return Results(read_results([main]), tried, read_results([timing]), chosen)


def tuning_plan(scale: Scale) -> Plan:
    """Candidates, on other held-out prompts than those of the figures."""
    texts = [f"{name}:{TUNED_AT[name]},{options},{NUCLEUS}" for name in BASELINES for options in scale.candidates[name]]
    return _plan([*texts, f"best-of-n:n=32,{NUCLEUS}"], count=scale.tuning, seed=1)


def overlap(scale: Scale) -> int:
    """Prompts that hyperparameters were chosen on and figures are of."""
    return len(
        {c.id for c in load_cases("world", scale.tuning, 1)} & {c.id for c in load_cases("world", scale.prompts)}
    )


def choose(records: list[Record]) -> dict[str, str]:
    """For each baseline the options with the lowest attack success at Best-of-32's compute, of equals the cheapest.

    A candidate that cannot be had for so little compute is left out, unless none can.
    """
    groups = group(records)
    compute = next(g for g in groups if g.method.startswith("best-of-n")).flops
    chosen = {}
    for name in BASELINES:
        found = curves(g for g in groups if g.method.partition(":")[0] == name)
        best = min(found, key=lambda curve: _standing(curve, compute))
        chosen[name] = best.name.partition(":")[2]
    return chosen


def _standing(curve: Curve, compute: float) -> tuple[float, float, float]:
    values = curve.at(compute, JUDGE)
    cheapest = curve.groups[0]
    if values is None:
        return 1.0, float(cheapest.harmful(JUDGE).mean()), cheapest.flops
    return 0.0, float(values.mean()), cheapest.flops


def sweep(scale: Scale, name: str, options: str, method: str | None = None) -> list[str]:
    """A method at all its budgets."""
    return expand(f"{method or name}:{scale.budgets[name]},{options}")


def main_plans(scale: Scale, chosen: dict[str, str]) -> list[Plan]:
    """Everything that is run on the prompts of the figures, with the models as they are."""
    samplers = ("saffron", "best-of-n")
    options = {name: NUCLEUS for name in samplers} | chosen
    paper = [m for name, given in options.items() for m in sweep(scale, name, given)]
    wide = [
        m
        for name, given in options.items()
        for m in expand(f"{name}:{scale.wide[name]},{given.replace(NUCLEUS, WIDE)}")
    ]
    with_mrm = [m for name, budgets in scale.with_mrm.items() for m in expand(f"{name}-mrm:{budgets},{options[name]}")]
    undefended = ["greedy", f"sample:{NUCLEUS}"]
    shown = [*undefended, *representatives(scale, chosen)]
    few = ["greedy", f"best-of-n:n=16,{NUCLEUS}", f"saffron:width=16,{NUCLEUS}"]
    return [
        _plan([f"best-of-n:n={scale.more},{NUCLEUS}"], count=scale.prompts, batch=10),
        _plan([*shown, *paper, *wide, *with_mrm, *exploration(scale, chosen), *ablations()], count=scale.prompts),
        _plan(few, count=scale.prompts, attacks=tuple(expand(f"prefill:{scale.lengths}"))),
        _plan(
            few,
            count=scale.prompts,
            attacks=("none", "role-play", "suffix", "role-play+prefill:10", "suffix+prefill:10"),
        ),
        _plan(shown, count=scale.prompts, attacks=("none",), data=("world-allowed",)),
    ]


def representatives(scale: Scale, chosen: dict[str, str]) -> list[str]:
    """One run of each method, at the middle of its budgets, and a few of Saffron."""
    sweeps = {name: sweep(scale, name, chosen[name]) for name in BASELINES}
    return [
        f"best-of-n:n=32,{NUCLEUS}",
        *(methods[len(methods) // 2] for methods in sweeps.values()),
        f"saffron:width=16,{NUCLEUS}",
        f"saffron:width=32,{NUCLEUS}",
        f"saffron:width=16,{WIDE}",
    ]


def exploration(scale: Scale, chosen: dict[str, str]) -> list[str]:
    """Beam search by children, MCTS and DeAL by lookahead, all else equal (the paper's table 2)."""
    children = _without(chosen["beam"], "children")
    simulations = sweep(scale, "mcts", "lookahead=0")[len(sweep(scale, "mcts", "")) // 2].partition(",")[0]
    return [
        *expand(f"beam:width=2,children={scale.children},{children}"),
        *expand(f"{simulations},lookahead={scale.lookahead},{_without(chosen['mcts'], 'lookahead')}"),
        *expand(f"deal:width=1,lookahead={scale.lookahead},{_without(chosen['deal'], 'lookahead')}"),
    ]


def _without(options: str, name: str) -> str:
    return ",".join(option for option in options.split(",") if option.partition("=")[0] != name)


def ablations() -> list[str]:
    """Saffron search with one thing changed."""
    return [
        *expand("saffron:width=16,top_p=0.6/0.7/0.8/0.9/0.95/1.0"),
        *(f"saffron:width=16,{NUCLEUS},{change}" for change in CHANGES),
        *expand("best-of-n:n=16,top_p=0.6/0.8/0.95/1.0"),
        *expand("beam:width=1,children=8,step_tokens=1,top_p=0.6/0.8/0.95/1.0"),
    ]


CHANGES = ("lm_head_bias=false", "ranking=released", "eos_score=mrm")


def unmasked_plan(scale: Scale) -> Plan:
    """Saffron search with rewards of tokens that the MRM was never trained on."""
    models = ModelFiles(device="cpu", variant="no unseen mask")
    return _plan(expand("saffron:width=16,top_p=0.8/0.95/1.0"), count=scale.prompts, models=models)


def timing_plans(scale: Scale, variant: str) -> list[Plan]:
    """One prompt at a time, in one process: Saffron by width, and two methods with and without the trie cache."""
    models = ModelFiles(device="cpu", variant=variant)
    cached = ["greedy", f"saffron:width=16,{NUCLEUS}", f"best-of-n:n=16,{NUCLEUS}"]
    plans = [_plan(cached, count=scale.timed, batch=1, models=models)]
    if not variant:
        plans.append(_plan(sweep(scale, "saffron", NUCLEUS), count=scale.timed, batch=1))
    return plans


def _plan(methods: Sequence[str], **changes: object) -> Plan:
    texts = tuple(dict.fromkeys(m for text in methods for m in expand(text)))
    settings = {"attacks": (ATTACK,), "batch": 40, "models": ModelFiles(device="cpu")} | changes
    return Plan(methods=texts, **settings)  # type: ignore[arg-type]
