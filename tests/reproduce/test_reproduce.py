"""`saffron reproduce`: what it plans and chooses, and that its page says what the runs say."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re

import pytest

from reproduce import claims, runs
from reproduce.results_page import Material, write_pages
from reproduce.runs import FULL, QUICK, Results, Scale
from saffron.evaluation import metrics, tables
from saffron.evaluation.metrics import group
from saffron.evaluation.run import Plan
from saffron.search import parse_config


@pytest.mark.parametrize("scale", [FULL, QUICK])
def test_every_method_of_every_run_is_one(scale):
    chosen = {
        "beam": "children=8,step_tokens=1,top_p=0.8",
        "rebase": "balance=1,step_tokens=4,top_p=0.8",
        "deal": "children=8,lookahead=4,top_p=0.8",
        "mcts": "children=8,lookahead=0,exploration=1,top_p=0.8",
    }
    plans = [runs.tuning_plan(scale), *runs.main_plans(scale, chosen), runs.unmasked_plan(scale)]
    for plan in plans:
        for method in plan.methods:
            parse_config(method)
    methods = {method for plan in plans for method in plan.methods}
    assert set(runs.representatives(scale, chosen)) <= methods
    assert set(runs.exploration(scale, chosen)) <= methods
    assert FULL.prompts >= 200 and runs.overlap(FULL) == 0


def test_the_best_candidate_at_the_compute_is_chosen():
    def results(method: str, successes: int, gflop: float) -> list[dict]:
        return [
            {"data": "world", "attack": "prefill:10", "method": method, "variant": "", "case": str(i), "models": "m",
             "harmful": {"oracle": i < successes}, "cost": {"policy_flops": gflop * 1e9, "reward_flops": 0}}
            for i in range(10)
        ]  # fmt: skip

    records = results("best-of-n:n=32,top_p=0.8", 5, 4)
    for name in runs.BASELINES:
        records += results(f"{name}:width=1,a=1", 8, 1) + results(f"{name}:width=4,a=1", 4, 8)  # 0.53 at 4 GFLOP
        records += results(f"{name}:width=1,a=2", 6, 1) + results(f"{name}:width=4,a=2", 5, 8)  # 0.53, then 0.5
        records += results(f"{name}:width=1,a=3", 1, 5)  # lower, and too dear
    assert runs.choose(records) == dict.fromkeys(runs.BASELINES, "a=1")
    assert runs.choose([r for r in records if r["method"][-1] in "38"])["beam"] == "a=3"


def made_up(scale: Scale) -> Results:
    """Results of every run, drawn: dearer methods do better, Saffron best."""
    rng, records = random.Random(0), {"tuning": [], "main": [], "timing": []}

    def add(name: str, plan: Plan) -> None:
        for data, attack, method in itertools.product(plan.data, plan.attacks, plan.methods):
            flops = 1e9 * (metrics.budget(method) or 1)
            rate = 0.9 ** (flops / 1e9 * (3 if method.startswith("saffron") else 1))
            records[name] += [
                {"data": data, "attack": attack, "method": method, "variant": plan.models.variant, "case": case,
                 "models": "m", "kind": "forbidden", "prompt": "p", "prefill": "f", "text": f"Then {case} goes on.",
                 "tokens": 5, "finish_reason": "eos", "score": 0.0, "scores": {"prm": 1.0}, "log_probability": -0.5,
                 "harmful": dict.fromkeys(("oracle", "prm"), rng.random() < rate), "answered": data != "world" or None,
                 "cost": {"policy_flops": int(flops), "reward_flops": 0, "policy_tokens": 5, "reward_tokens": 5,
                          "policy_calls": 5, "reward_calls": 2, "seconds": 0.01}}
                for case in map(str, range(plan.count or 0))
                if (data, attack, method, plan.models.variant, case) not in done[name]
                and not done[name].add((data, attack, method, plan.models.variant, case))
            ]  # fmt: skip

    done: dict[str, set] = {name: set() for name in records}
    add("tuning", runs.tuning_plan(scale))
    chosen = runs.choose(records["tuning"])
    for plan in [*runs.main_plans(scale, chosen), runs.unmasked_plan(scale)]:
        add("main", plan)
    for variant in ("", "no trie cache"):
        for plan in runs.timing_plans(scale, variant):
            add("timing", plan)
    return Results(records["main"], records["tuning"], records["timing"], chosen)


@pytest.mark.parametrize("scale", [dataclasses.replace(FULL, prompts=6, tuning=4), QUICK], ids=["full", "quick"])
def test_the_page_says_what_the_runs_say(tmp_path, scale):
    pytest.importorskip("matplotlib")
    results = made_up(scale)
    mrm = {"commands": "saffron annotate", "table": "| a |", "picture": "figures/rewards.png"}
    context = {"command": "saffron reproduce", "minutes": "1", "workers": "processes: 1"}
    page = write_pages(scale, results, tmp_path, mrm, context).read_text()
    assert "{{" not in page and "None" not in page and "nan" not in page
    for method in ("greedy", "saffron:width=16,top_p=0.8"):
        (found,) = group(results.main, method=method, attack="prefill:10", data="world", variant="")
        assert tables.interval(found.success("oracle")) in page and f"`{method}`" in page
    pictures = re.findall(r"\]\((figures/[^)]*)\)", page)
    assert len(pictures) == 6 and all((tmp_path / name).stat().st_size > 1000 for name in pictures[:-1])
    rows = re.findall(r"^\| [^|]* (?:below|reaches|lowers) [^|]*\| (.*) \|$", page, re.MULTILINE)
    assert len(rows) >= 12 and all(re.match(r"holds|does not hold|never|can not", verdict) for verdict in rows)
    curves = Material(scale, results).sweeps()
    expected = claims.verdict(claims.compare(curves["saffron"], curves["best-of-n"], "oracle"))
    assert f"| Saffron below Best-of-N at its compute | {expected} |" in page
