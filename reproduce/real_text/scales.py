"""What is run at each scale."""

from __future__ import annotations

from dataclasses import dataclass

from reproduce.real_text.sweep import Grid

REWARD_SCALE = 8.0  # the MRM learns rewards of this times min(0, compound), from -8 to 0
TOP_P = 0.8


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run.

    Attributes:
        train: attacked prompts that the policy continues for the corpus; each is continued without the attack too.
        samples, even: continuations of each, by probability and evenly from the nucleus.
        tokens: longest continuation and answer.
        grid: what is swept on the validation prompts.
        test, plain: attacked and unattacked test prompts.
        methods: run on the attacked ones; `{cap}`, `{tolerance}` and `{weight}` stand for what the sweep chose,
            `{calibrated}` for the cap without a sweep.
        few, costly: these methods run on the first so many attacked ones, when all others are done.
        plain_methods: on the unattacked ones.
        epochs, rank: of the MRM's head.
        batch: prompts decoded together.
    """

    train: int
    samples: int
    even: int
    tokens: int
    grid: Grid
    test: int
    plain: int
    methods: tuple[str, ...]
    plain_methods: tuple[str, ...]
    few: int = 0
    costly: tuple[str, ...] = ()
    epochs: int = 20
    rank: int = 8
    batch: int = 20


# ARGS: w = 1.5 of its published runs, for the reward as it is, and in the MRM's units. CARDS: the published beta of
# 0.7, in the MRM's units (0.7 / 8); the reward to reach is the best there is.
ARGS = "args:children=10,reward_weight=1.5"
ARGS_SCALED = "args:children=10,reward_weight=12"
CARDS = "cards:reward_threshold=0,beta=0.0875"
FULL = Scale(
    train=180,
    samples=4,
    even=4,
    tokens=24,
    grid=Grid(8, 10, (0.1, 0.3, 0.5, 0.7, 0.9), (0.8, 1.6), (0.8, 2.4)),
    test=60,
    plain=20,
    methods=(
        "greedy", "sample", "saffron:width=8,reward_cap={cap}", "best-of-n:n=16", "saffron:width=8",
        "saffron:width=8,reward_cap={calibrated}", ARGS_SCALED, CARDS,
        "saffron:width=2,reward_cap={cap}", "saffron:width=2", "best-of-n:n=4",
        "saffron:width=8,reward_tolerance={tolerance}", "saffron:width=8,policy_weight={weight}", ARGS,
        "saffron:width=4,reward_cap={cap}", "saffron:width=4", "best-of-n:n=8", "beam:width=2,children=8",
        "saffron:width=1,reward_cap={cap}", "saffron:width=1", "best-of-n:n=2",
        "saffron:width=16,reward_cap={cap}", "best-of-n:n=32", "saffron:width=16",
    ),
    plain_methods=(
        "greedy", "sample", "saffron:width=8,reward_cap={cap}", "saffron:width=8,reward_cap={calibrated}",
        "saffron:width=8,reward_tolerance={tolerance}", "saffron:width=8", "best-of-n:n=16", ARGS_SCALED, CARDS,
    ),
    few=20,
    costly=("rebase:width=16", "beam:width=4,children=8", "deal:width=1,children=8,lookahead=4",
            "mcts:simulations=8,children=4"),
)  # fmt: skip
SMALL = Scale(
    train=180,
    samples=2,
    even=2,
    tokens=24,
    grid=Grid(4, 10, (0.1, 0.5, 0.9), (1.6,), (2.4,)),
    test=40,
    plain=20,
    methods=(
        "greedy", "sample", "saffron:width=8,reward_cap={cap}", "best-of-n:n=16", "saffron:width=8", ARGS_SCALED, CARDS,
        "saffron:width=4,reward_cap={cap}", "saffron:width=8,policy_weight={weight}",
        "saffron:width=8,reward_tolerance={tolerance}", "saffron:width=4", "best-of-n:n=8", "beam:width=2,children=8",
    ),
    plain_methods=("greedy", "saffron:width=8,reward_cap={cap}"),
)  # fmt: skip
QUICK = Scale(
    train=4,
    samples=1,
    even=1,
    tokens=6,
    grid=Grid(2, 2, (0.5, 0.9), (), ()),
    test=3,
    plain=2,
    methods=("greedy", "sample", "best-of-n:n=2", "saffron:width=2", "saffron:width=2,reward_cap={cap}"),
    plain_methods=("greedy", "saffron:width=2,reward_cap={cap}"),
    few=1,
    costly=("cards:reward_threshold=0,beta=0.0875",),
    epochs=2,
    rank=2,
)
SCALES = {"full": FULL, "small": SMALL, "quick": QUICK}
