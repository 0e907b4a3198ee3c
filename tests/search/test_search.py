"""Saffron search against a dense search written from the paper, and everything a caller relies on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from searches import CONFIG, REQUESTS, comparable

from saffron.errors import ConfigError, NumericalError, PromptTooLongError
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import GreedyConfig, GreedyDecoding, Request, SaffronSearch, reference
from saffron.search.config import SearchConfig
from saffron.search.tree import Node


def dense_search(
    policy: Policy, mrm: MultifurcationRewardModel, request: Request, config: SearchConfig, end: int = 1
) -> reference.Response:
    """`search.reference` over the same weights in plain eager models."""
    dense, base = (
        tiny.model(seed=0, attention="eager"),
        tiny.model(seed=1, attention="eager", hidden_size=32, num_attention_heads=4, num_hidden_layers=2),
    )
    dense.load_state_dict(policy.model.state_dict())
    base.load_state_dict(mrm.model.state_dict())
    assert mrm.unseen is not None
    bias = mrm.full_bias(config.lm_head_bias)

    @torch.no_grad()
    def logits(response: list[int]) -> torch.Tensor:
        return dense(torch.tensor([[*request.policy, *response]])).logits[0, -1]

    @torch.no_grad()
    def rewards(response: list[int]) -> torch.Tensor:
        out = base(torch.tensor([[*request.reward, *response]])).logits[0, -1]
        return out if bias is None else out + bias

    return reference.search(logits, rewards, mrm.unseen, {end}, config)[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("eos_score", ["parent", "mrm"])
def test_equals_a_dense_search(seed: int, eos_score: str) -> None:
    policy, mrm = tiny.pair(seed)
    config = replace(CONFIG, eos_score=eos_score, width=1 + 2 * seed)  # type: ignore[arg-type]
    for request, result in zip(REQUESTS, SaffronSearch(policy, mrm, config).search(REQUESTS), strict=True):
        tokens, score, *_ = dense_search(policy, mrm, request, config)
        tokens = list(tokens)
        assert result.token_ids == tokens
        assert result.score == pytest.approx(score, abs=1e-4)
        assert result.finish_reason == ("eos" if tokens[-1] == 1 else "length")


@pytest.mark.parametrize("ranking", ["paper", "released"])
def test_a_forest_equals_searching_alone(ranking: str) -> None:
    policy, mrm = tiny.pair()
    search = SaffronSearch(policy, mrm, replace(CONFIG, ranking=ranking))  # type: ignore[arg-type]
    together = search.search([*REQUESTS, REQUESTS[1]])
    for request, result in zip([*REQUESTS, REQUESTS[1]], together, strict=True):
        (alone,) = search.search([request])
        assert comparable(result) == comparable(alone)
        assert result.score == pytest.approx(alone.score, abs=1e-4)
    assert policy.kv.num_nodes == mrm.kv.num_nodes == 0
    assert search.search([]) == []


def test_same_input_same_bits() -> None:
    policy, mrm = tiny.pair()
    first, second = (SaffronSearch(policy, mrm, CONFIG).search(REQUESTS, trace=True) for _ in range(2))
    assert first == second


def test_released_ranking_answers_with_finished_responses_first() -> None:
    policy, mrm = tiny.pair(2)
    config = replace(CONFIG, ranking="released", eos_score="mrm", width=8, top_p=0.99)
    for (handle,) in SaffronSearch(policy, mrm, config).run([REQUESTS[0]]):
        tree = handle.tree
        done = [node.finished for node in tree.beam]
        assert done == sorted(done, reverse=True)
        assert len(tree.beam) <= 8


def distinct_prefixes(nodes: list[Node]) -> int:
    return len({tuple(n.tokens()[: i + 1]) for n in nodes for i in range(n.depth)})


@pytest.mark.parametrize("width", [1, 4, 16])
def test_proposition_2_memory_held_is_distinct_live_prefixes(width: int) -> None:
    """The cache holds one node per distinct prefix, and never more than the bound of Proposition 2."""
    policy, mrm = tiny.pair(3)
    search = SaffronSearch(policy, mrm, replace(CONFIG, width=width, max_new_tokens=16))
    prompt = len(REQUESTS[0].policy)
    before = 0
    for (handle,) in search.run([REQUESTS[0]]):
        tree = handle.tree
        live = tree.live
        held = prompt + distinct_prefixes(live)
        assert tree.steps[-1].trie_nodes == held
        # What the models have cached is one step behind: the children chosen now are run in the next step.
        assert policy.kv.num_nodes - prompt == mrm.kv.num_nodes - len(REQUESTS[0].reward) == before
        before = held - prompt
        # Lexicographic order: summed lengths, less what each sequence shares with the one before it.
        texts = sorted(node.tokens() for node in live)
        shared = sum(tiny.common_prefix(a, b) for a, b in zip(texts, texts[1:], strict=False))
        assert before == sum(map(len, texts)) - shared
    assert policy.kv.num_nodes == mrm.kv.num_nodes == 0


def test_statistics() -> None:
    policy, mrm = tiny.pair()
    (result,) = SaffronSearch(policy, mrm, CONFIG).search(REQUESTS[:1])
    assert [s.step for s in result.steps] == list(range(len(result.steps)))
    live = 1
    for s in result.steps:
        assert len(s.nucleus_sizes) == s.reward_model_calls == live
        assert s.candidates == sum(s.nucleus_sizes) >= live
        assert 1 <= s.live + s.finished <= CONFIG.width
        assert s.policy_flops > s.reward_flops > 0
        live = s.live


def test_analytic_flops_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    policy, _ = tiny.pair()
    tokens = [0, 5, 6, 7, 8, 9]
    dense = tiny.model(attention="eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        dense(torch.tensor([tokens]), logits_to_keep=1, use_cache=False)
    flops = policy.flops
    causal = flops.prompt(len(tokens)) + flops.per_head_row * policy.vocab_size
    square = causal + flops.per_pair * (len(tokens) ** 2 - len(tokens) * (len(tokens) + 1) // 2)
    rotary = 2 * len(tokens) * 4  # some versions of transformers make the RoPE angles by a matrix product
    assert counter.get_total_flops() - square in (0, rotary)  # dense attention computes the masked half as well


def test_steps_of_unseen_tokens_keep_the_policys_order() -> None:
    policy, mrm = tiny.pair()
    mrm.unseen = torch.ones_like(mrm.unseen)  # type: ignore[arg-type]
    (result,) = SaffronSearch(policy, mrm, replace(CONFIG, width=1)).search(REQUESTS[:1])
    assert all(step.all_unseen for step in result.steps)
    greedy: list[int] = []
    model = tiny.model(attention="eager")
    while len(greedy) < CONFIG.max_new_tokens and 1 not in greedy:
        with torch.no_grad():
            logits = model(torch.tensor([[*REQUESTS[0].policy, *greedy]])).logits[0, -1]
        if len(greedy) < CONFIG.min_new_tokens:
            logits[1] = -torch.inf
        greedy.append(int(logits.argmax()))
    assert result.token_ids == greedy


def test_trace(tmp_path: Path) -> None:
    policy, mrm = tiny.pair()
    search = SaffronSearch(policy, mrm, CONFIG)
    (plain,), (traced,) = search.search(REQUESTS[:1]), search.search(REQUESTS[:1], trace=True)
    assert replace(traced, trace=None) == plain
    traced.write_trace(tmp_path / "trace.jsonl")
    *steps, last = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert last["answer"]["token_ids"] == plain.token_ids
    assert len(steps) == len(plain.steps)
    known = {0}
    for record, statistics in zip(steps, plain.steps, strict=True):
        candidates = [c for e in record["expanded"] for c in e["candidates"]]
        assert len(candidates) == statistics.candidates
        children = {c["child"]: c for c in candidates if c["child"] is not None}
        for node in record["beam"]:
            assert node["node"] in known or children[node["node"]]["token"] == node["token"]
            if node["node"] in children and not node["finished"]:
                assert children[node["node"]]["reward"] == node["score"]
        known |= set(children)
    with pytest.raises(ValueError, match="trace"):
        plain.write_trace(tmp_path / "none.jsonl")


def test_numbers_that_are_not_finite_stop_the_search_and_free_the_cache() -> None:
    policy, mrm = tiny.pair()
    weight = mrm.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    with torch.no_grad():
        weight[0, 0] = torch.nan
    found = r"mrm: .* nor is its weight model\.layers\.1\.mlp\.down_proj\.weight \(of a Linear\); the search was"
    with pytest.raises(NumericalError, match=found):
        SaffronSearch(policy, mrm, CONFIG).search(REQUESTS)
    assert policy.kv.num_nodes == mrm.kv.num_nodes == 0


@pytest.mark.parametrize("ranking", ["paper", "released"])
def test_rewards_that_are_infinite_stop_the_search(ranking: str) -> None:
    """Every hidden state is finite, and a row of the head is not: its token would win whatever it says."""
    policy, mrm = tiny.pair()
    mrm.model.get_output_embeddings().weight.data[:, 0] = torch.inf
    search = SaffronSearch(policy, mrm, replace(CONFIG, ranking=ranking))
    with pytest.raises(NumericalError, match="mrm: its reward is not finite"):
        search.search(REQUESTS)
    assert policy.kv.num_nodes == mrm.kv.num_nodes == 0


def test_closing_a_search_midway_frees_the_cache() -> None:
    policy, mrm = tiny.pair()
    steps = SaffronSearch(policy, mrm, CONFIG).run(REQUESTS)
    next(steps), next(steps)
    assert policy.kv.num_nodes > 0
    steps.close()
    assert policy.kv.num_nodes == mrm.kv.num_nodes == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("width", 0),
        ("width", True),
        ("width", 1.5),
        ("top_p", 1.5),
        ("top_p", 0),
        ("top_p", float("nan")),
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("ranking", "best"),
        ("eos_score", "none"),
        ("unseen_reward", float("-inf")),
        ("lm_head_bias", 1),
    ],
)
def test_config_is_validated(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{option}: got"):
        replace(CONFIG, **{option: value})


def test_bad_requests_are_refused_before_anything_runs() -> None:
    policy, mrm = tiny.pair()
    search = SaffronSearch(policy, mrm, CONFIG)
    with pytest.raises(PromptTooLongError, match="prompt 1: 245 tokens and 12 new"):
        search.search([REQUESTS[0], Request((3,) * 245, (3,))])
    with pytest.raises(ConfigError, match=r"requests\[0\]"):
        search.search([Request((3, 97), (3,))])
    with pytest.raises(ConfigError, match="vocabulary"):
        SaffronSearch(Policy(tiny.model(vocab_size=120)), mrm)
    with pytest.raises(ConfigError, match="tokenizer"):
        search.generate(["hello"])


def test_a_string_is_one_prompt_and_a_call_has_its_own_configuration() -> None:
    models = tiny.trio()
    search = SaffronSearch(models.policy, models.mrm, CONFIG)
    (one,) = search.generate("hello there", config=replace(CONFIG, max_new_tokens=2))
    assert one.prompt == "hello there" and len(one.token_ids) == 2
    (greedy,) = GreedyDecoding(models.policy, config=GreedyConfig(max_new_tokens=3)).generate("hello there")
    assert len(greedy.token_ids) <= 3


# --- with text ---


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    guard = tiny.save_checkpoint(folder / "guard", seed=1)
    return tiny.save_checkpoint(folder / "policy"), guard, tiny.save_mrm(folder / "mrm", guard)


@pytest.fixture(scope="module")
def text_search(checkpoints: tuple[Path, Path, Path]) -> SaffronSearch:
    policy, guard, mrm = checkpoints
    return SaffronSearch(
        Policy.from_pretrained(policy), MultifurcationRewardModel.from_pretrained(mrm, base=guard), CONFIG
    )


def test_generate_and_stream(text_search: SaffronSearch) -> None:
    results = text_search.generate(["hello there", "please tell me"], ["the quick", ""])
    for result, prompt, prefill in zip(results, ["hello there", "please tell me"], ["the quick", ""], strict=True):
        assert result.prompt == prompt and result.prefill == prefill
        assert result.text == text_search.policy.decode(result.token_ids)
        assert "".join(text_search.stream(prompt, prefill)) == result.text
    with pytest.raises(ConfigError, match="prefill: got 1 for 2"):
        text_search.generate(["a", "b"], ["c"])
    with pytest.raises(ConfigError, match="prompt"):
        text_search.generate([""])


@pytest.mark.parametrize("prompt", [["hi"], ["a", "b"], {"role": "user"}, 5, None, ""])
def test_stream_takes_one_prompt(text_search: SaffronSearch, prompt: object) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        list(text_search.stream(prompt))  # type: ignore[arg-type]


def test_stream_never_takes_back_what_it_said(text_search: SaffronSearch) -> None:
    narrow = SaffronSearch(text_search.policy, text_search.mrm, replace(CONFIG, width=1))
    pieces = list(narrow.stream("hello there"))
    assert len(pieces) > 3  # with one beam every token is final at once
    (result,) = narrow.generate(["hello there"])
    assert "".join(pieces) == result.text


def test_the_mrm_is_not_shown_the_prefill(text_search: SaffronSearch) -> None:
    bare, attacked = (text_search.request("hello there", prefill) for prefill in ("", "the quick"))
    assert bare.reward == attacked.reward and len(attacked.policy) > len(bare.policy)
    assert text_search.mrm.decode(bare.reward) == "\n\nUser:hello there\n\nAgent:"


def test_through_text_encodes_only_the_end_anew(text_search: SaffronSearch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced through text although the tokenizers agree: the MRM reads what encoding all of the text gives."""
    policy, mrm = text_search.policy, text_search.mrm
    read: list[list[int]] = []
    plain_read, texts = mrm.read, mrm.encoder.texts
    encoded: list[int] = []
    monkeypatch.setattr("saffron.search.model_pair.same_tokens", lambda *_: False)
    monkeypatch.setattr(mrm, "read", lambda sequences: read.extend(sequences) or plain_read(sequences))
    monkeypatch.setattr(mrm.encoder, "texts", lambda pieces: encoded.extend(map(len, pieces)) or texts(pieces))
    search = SaffronSearch(policy, mrm, replace(CONFIG, max_new_tokens=24, min_new_tokens=24))
    request = search.request("hello there", "the quick")
    encoded.clear()
    expected = [list(request.reward)]
    for (handle,) in search.run([request]):
        said = [policy.decode(node.tokens()) for node in handle.tree.live if node.depth < 24]
        expected += [[*request.reward, *mrm.encode(text)] for text in said]
    assert len(expected) > 24 and sorted(map(tuple, read)) == sorted(map(tuple, expected))
    assert max(encoded) < max(len(mrm.decode(sequence[len(request.reward) :])) for sequence in expected)
    assert mrm.kv.num_nodes == policy.kv.num_nodes == 0


def test_another_tokenizer_works_through_text(tmp_path: Path, checkpoints: tuple[Path, Path, Path]) -> None:
    other = tiny.tokenizer(280, ["completely different words make a different vocabulary"] * 4)
    guard = tmp_path / "guard"
    tiny.model(seed=5, attention="eager", vocab_size=len(other)).save_pretrained(guard)
    other.save_pretrained(guard)
    mrm = MultifurcationRewardModel.from_pretrained(tiny.save_mrm(tmp_path / "mrm", guard), base=guard)
    policy = Policy.from_pretrained(checkpoints[0])
    search = SaffronSearch(policy, mrm, CONFIG)
    assert search.models.head(True).weight.shape[0] == policy.vocab_size
    (result,) = search.generate(["hello there"])
    (handle,) = list(search.run([search.request("hello there", "")]))[-1]
    tree = handle.tree
    assert tree.answer.tokens() == result.token_ids
    assert mrm.kv.num_nodes == 0
