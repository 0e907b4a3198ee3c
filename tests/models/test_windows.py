"""Sliding windows over a trie: plans against who sees whom, and models whose windows are shorter than the text."""

from __future__ import annotations

from typing import Any

import architectures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import generate, outcome, search

from saffron import TrieModel
from saffron.models.windows import windowed
from saffron_kernels import KVTrie, TreeStep

LONG = [list(range(5, 31)), [*range(5, 14), *range(40, 60)], [5, 6, 7, 20], [30, 31, *range(5, 19)]]
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# Layers of one kind, and of two; windows as long as a step, and longer than some texts.
WINDOWS: dict[str, dict[str, Any]] = {
    "MistralConfig": {},
    "Phi3Config": {},
    "Starcoder2Config": {},
    "Qwen2Config": {"use_sliding_window": True, "max_window_layers": 1},
    "Qwen3Config": {"use_sliding_window": True, "max_window_layers": 2},
    "Qwen2MoeConfig": {"use_sliding_window": True, "max_window_layers": 1},
    "Gemma2Config": {},
    "Gemma3TextConfig": MIXED,
    "Gemma3nTextConfig": {},
    "GptOssConfig": {},
    "Cohere2Config": MIXED,
    "Exaone4Config": MIXED,
    "Olmo3Config": MIXED,
    "MixtralConfig": {},
    "PhimoeConfig": {},
    "ModernBertDecoderConfig": {"local_attention": 6},
    "AfmoeConfig": {},
    "SmolLM3Config": {"use_sliding_window": True, "no_rope_layers": [0, 1, 0]},
    "MinistralConfig": {},
    "GraniteSWAConfig": {},
    "FlintConfig": MIXED,
    "LagunaConfig": MIXED,
}


# Every window for layers of one kind, for two, with sinks and with soft-capping; for the others one each, in turn.
SIZES = (2, 6, 11)
EACH = ("MistralConfig", "Gemma3TextConfig", "GptOssConfig", "Gemma2Config")
CASES = [(name, window) for i, name in enumerate(WINDOWS) for window in (SIZES if name in EACH else SIZES[i % 3 :][:1])]


@pytest.mark.parametrize(("name", "window"), CASES)
def test_texts_longer_than_the_window(name: str, window: int) -> None:
    if name not in architectures.classes():
        pytest.skip(f"this transformers has no {name}")
    changes = {**WINDOWS[name], "sliding_window": window}
    try:
        ours, eager = (architectures.model(name, "eager", **changes) for _ in range(2))
    except (ValueError, TypeError) as error:  # a configuration of another release
        pytest.skip(str(error))
    trie = TrieModel(ours)
    assert set(trie.geometry.windows) - {None}, "no layer has a window"
    search(trie, eager, LONG, steps=4)
    if name in EACH and window == 6:
        generate(ours, eager)


def seen(plan: TreeStep, queries: int) -> list[list[int]]:
    """The slots that each query sees."""
    entries = list(zip(plan.slot.tolist(), plan.begin.tolist(), plan.end.tolist(), strict=True))
    return [sorted(slot for slot, begin, end in entries if begin <= query < end) for query in range(queries)]


def within(plan: TreeStep, window: int, depth: dict[int, int]) -> list[list[int]]:
    positions = plan.positions.tolist()
    whole = seen(plan, len(positions))
    return [[s for s in slots if depth[s] > p - window] for slots, p in zip(whole, positions, strict=True)]


texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(before=texts, now=texts, window=st.integers(1, 8), steps=st.integers(0, 5), seed=st.integers(0, 2**16))
def test_every_query_sees_the_window_above_it_and_nothing_else(
    before: list[list[int]], now: list[list[int]], window: int, steps: int, seed: int
) -> None:
    """Prefills over tries that hold some of the tokens already, then steps in which beams fork and end."""
    choose = np.random.default_rng(seed)
    kv = KVTrie(1, 1, 2, capacity=4)
    kv.release(kv.insert(before).leaves)
    fill = kv.insert(now)
    depth = {int(kv.index.match(np.array(t, dtype=np.int32))[i]): i for t in now for i in range(len(t))}

    def check(plan: TreeStep) -> None:
        narrow = windowed(plan, window)
        assert seen(narrow, len(plan.positions)) == within(plan, window, depth)
        assert len(narrow.slot) <= 2 * len(plan.slot)
        assert bool((narrow.begin < narrow.end).all())

    check(fill.step)
    beams, _ = kv.beams(fill.leaves)
    for _ in range(steps):
        parents = np.sort(choose.integers(0, len(beams.nodes), size=4)).astype(np.int32)
        beams, plan = kv.advance(beams, parents, choose.integers(0, 3, size=4).astype(np.int32))
        depth.update(zip(beams.nodes.tolist(), beams.positions.tolist(), strict=True))
        check(plan)


def test_the_whole_sweep_beyond_its_windows() -> None:
    """Every configuration that knows `sliding_window`, whatever its layers are."""
    results = {}
    for name, (config_class, _) in architectures.classes().items():
        knows = "sliding_window" in getattr(config_class, "__dataclass_fields__", {})
        if knows and name not in architectures.NOT_BUILT and name not in WINDOWS:
            try:
                architectures.build(config_class, sliding_window=4)
            except ValueError:
                continue
            results[name] = outcome(name, LONG, sliding_window=4)
    assert list(results.values()).count("equal") >= 5, results
