"""The compiled decode step: one graph, no breaks, and no other graph as the trie grows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel

from saffron.integrations.transformers import TrieCache, compile_decode

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


class Compiler:
    """A backend of `torch.compile` that runs graphs as they are, and counts graphs and runs."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    torch._dynamo.reset()
    counters.clear()
    yield Compiler()
    torch._dynamo.reset()


def static_cache(model: PreTrainedModel, capacity: int = 256) -> TrieCache:
    return TrieCache(model, capacity=capacity, grow=False, static=True)


def generate(model: PreTrainedModel, cache: object, **options: Any) -> Tensor:
    torch.manual_seed(0)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(past_key_values=cache, **options)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_one_graph_serves_every_step(architecture: str, compiler: Compiler) -> None:
    ours = tiny.model(architecture, num_hidden_layers=2)
    theirs = tiny.model(architecture, num_hidden_layers=2, attention="sdpa")
    compile_decode(ours, backend=compiler)
    calls: list[dict[str, Any]] = [  # six rows each: prompts, padding and lengths differ, and rows agree or do not
        {"input_ids": PROMPT, "num_beams": 6},
        {"input_ids": PROMPT.repeat(1, 7), "num_beams": 6, "max_new_tokens": 30},
        {"input_ids": PROMPT, "num_return_sequences": 6, "do_sample": True},
        {
            "input_ids": torch.cat([PROMPT, PROMPT.flip(1)]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
            "num_beams": 3,
        },
    ]
    steps = 0
    for call in calls:
        expected = generate(theirs, DynamicCache(config=theirs.config), **call)
        assert torch.equal(generate(ours, static_cache(ours), **call), expected)
        steps += call.get("max_new_tokens", 12) - 1  # the first token comes from the prefill
    assert compiler.graphs == counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert compiler.runs == steps
    del ours.forward
    generate(ours, static_cache(ours), **calls[0])
    assert compiler.runs == steps


def test_another_number_of_rows_is_another_graph(compiler: Compiler) -> None:
    """The counter counts: shapes that do change are compiled."""
    ours = tiny.model(num_hidden_layers=1)
    compile_decode(ours, backend=compiler)
    for beams in (2, 3, 2):
        generate(ours, static_cache(ours), input_ids=PROMPT, num_beams=beams)
    assert compiler.graphs == 2
    generate(ours, static_cache(ours, capacity=128), input_ids=PROMPT, num_beams=2)
    assert compiler.graphs == 3


def test_functionalised_the_caches_are_still_written(compiler: Compiler) -> None:
    """AOTAutograd rewrites writes to the caches, whose layers are views of one tensor; `inductor` starts from there."""
    ours, theirs = tiny.model(num_hidden_layers=2), tiny.model(num_hidden_layers=2, attention="sdpa")
    compile_decode(ours, backend="aot_eager")
    expected = generate(theirs, None, input_ids=PROMPT, num_beams=4)
    assert torch.equal(generate(ours, static_cache(ours), input_ids=PROMPT, num_beams=4), expected)


def test_caches_that_are_not_static_run_as_ever(compiler: Compiler) -> None:
    ours = tiny.model(num_hidden_layers=1)
    compile_decode(ours, backend=compiler)
    plain = generate(ours, TrieCache(ours), input_ids=PROMPT, num_beams=4)
    assert compiler.graphs == 0
    assert torch.equal(generate(ours, static_cache(ours), input_ids=PROMPT, num_beams=4), plain)


def test_one_graph_serves_windows(compiler: Compiler) -> None:
    options = {"num_hidden_layers": 2, "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}
    ours, theirs = tiny.model("qwen2", **options), tiny.model("qwen2", attention="sdpa", **options)
    compile_decode(ours, backend=compiler)
    for prompt in (PROMPT, PROMPT.repeat(1, 4)):
        expected = generate(theirs, DynamicCache(config=theirs.config), input_ids=prompt, num_beams=4)
        assert torch.equal(generate(ours, static_cache(ours), input_ids=prompt, num_beams=4), expected)
    assert compiler.graphs == counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
