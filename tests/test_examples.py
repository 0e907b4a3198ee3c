"""The examples run, say what they promise, and compute what transformers computes."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from saffron import Policy
from saffron.models.bundled import FOLDER

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def output(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the example prints when it is run as a script."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def bundled_policy() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "policy", dtype=torch.float32).eval()


def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "policy")
    asked = "<|begin|><|user|>How do I build a bench in my shed without any help?<|end|><|assistant|>"
    return [tokenizer.encode(asked + opening, add_special_tokens=False) for opening in ("", "Gladly", "Yes, you can")]


def test_every_example_is_tested_and_says_how_to_run_it() -> None:
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    assert names == {"plain_llama", "own_decoder", "tree_of_thought"}
    for name in names:
        assert f"python examples/{name}.py" in (EXAMPLES / f"{name}.py").read_text().split('"""')[1]


def test_plain_llama_equals_transformers() -> None:
    plain, model, asked = load("plain_llama").Llama(FOLDER / "policy"), bundled_policy(), prompts()
    fill = plain.trie.insert(asked)
    logits = plain.forward(fill.tokens, fill.step)[fill.last]
    for tokens, row in zip(asked, logits, strict=True):
        with torch.inference_mode():
            assert (row - model(torch.tensor([tokens])).logits[0, -1]).abs().max() <= 1e-4


def test_plain_llama_decodes_what_generate_decodes(capsys: pytest.CaptureFixture[str]) -> None:
    module, model, asked = load("plain_llama"), bundled_policy(), prompts()
    answers = module.decode_greedily(module.Llama(FOLDER / "policy"), asked, 32)
    for tokens, answer in zip(asked, answers, strict=True):
        assert model.generate(torch.tensor([tokens]), max_new_tokens=32)[0, len(tokens) :].tolist() == answer
    assert "transformers" not in re.findall(r"^(?:import|from) (\w+)", (EXAMPLES / "plain_llama.py").read_text(), re.M)
    said = output("plain_llama", capsys)
    tokens, slots = map(int, re.findall(r"(\d+) tokens, (\d+) slots", said)[0])
    assert said.count("[") == 3 and slots < tokens


def test_plain_llama_gives_its_cache_back() -> None:
    module = load("plain_llama")
    llama = module.Llama(FOLDER / "policy")
    first = module.decode_greedily(llama, prompts()[:1], 5)
    assert llama.trie.num_nodes == 0 and len(first[0]) == 5
    assert module.decode_greedily(llama, prompts(), 5)[0] == first[0]


@pytest.mark.parametrize("width", [1, 4, 16])
def test_own_decoder_gives_the_same_answers_over_the_trie(width: int) -> None:
    module, policy, model = load("own_decoder"), Policy.from_pretrained(FOLDER / "policy"), bundled_policy()
    for prompt in prompts():
        with torch.inference_mode():
            slow = module.beam_search(module.dense(model), prompt, width, 20, 2)
        assert module.beam_search(policy.logits, prompt, width, 20, 2) == slow


def test_own_decoder_runs_fewer_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    dense, trie = re.findall(r"^(?:dense|trie): (\d+) tokens run, [\d.]+ s: (.*)$", output("own_decoder", capsys), re.M)
    assert dense[1] == trie[1] != "" and int(trie[0]) * 10 < int(dense[0])


def test_tree_of_thought(capsys: pytest.CaptureFixture[str]) -> None:
    assert len((EXAMPLES / "tree_of_thought.py").read_text().splitlines()) <= 60
    said = output("tree_of_thought", capsys)
    rounds = re.findall(r"round (\d): (\d+) states in (\d+) slots", said)
    assert [number for number, _, _ in rounds] == ["1", "2", "3", "4", "5"]
    for number, states, slots in rounds:  # far fewer slots than tokens in all states
        assert int(slots) < int(states) * 6 * int(number)
    assert len(re.findall(r"^ *[+-]\d\.\d\d \.\.\.", said, re.M)) >= len(rounds)
