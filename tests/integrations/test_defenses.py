"""The slots of red-teaming libraries, against the search itself."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

from saffron import SaffronSearch, SearchConfig
from saffron.errors import ConfigError
from saffron.integrations.defenses import AdversariaLLMTarget, JailbreakBenchDefense

USER = {"role": "user", "content": "hello there"}
FORCED = [USER, {"role": "assistant", "content": "the quick"}]


@pytest.fixture(scope="module")
def search() -> SaffronSearch:
    policy, mrm, _ = tiny.trio()
    return SaffronSearch(policy, mrm, SearchConfig(width=2, max_new_tokens=5, min_new_tokens=2))


def test_jailbreakbench(search: SaffronSearch) -> None:
    defense = JailbreakBenchDefense(search)
    (expected,) = search.generate([FORCED])  # type: ignore[list-item]
    size = len(search.policy.chat(FORCED))
    assert defense.query_with_dicts(FORCED) == (expected.text, size, len(expected.token_ids))
    assert defense.query(["hello there"]) == [defense.query_with_dicts([USER])]


def test_adversariallm_generates(search: SaffronSearch) -> None:
    target = AdversariaLLMTarget(search)
    said = target.generate([FORCED, [USER, {"role": "assistant", "content": ""}]], 2, 3, temperature=0.7, top_p=1.0)
    config = SearchConfig(width=2, max_new_tokens=3, min_new_tokens=2)
    forced, plain = (r.text for r in search.generate([FORCED, [USER]], config=config))  # type: ignore[list-item]
    assert said.gen == [[forced] * 2, [plain] * 2]
    assert said.input_ids == [search.policy.chat(FORCED), search.policy.chat([USER])]
    assert said.defense_decisions[0][0]["flops"] > 0


def test_adversariallm_losses_are_the_policys(search: SaffronSearch) -> None:
    target = AdversariaLLMTarget(search)
    full = torch.tensor([0, 5, 9, 7, 8, 12])
    logits = search.policy.logits([full[:i].tolist() for i in range(4, 6)])
    expected = float(cross_entropy(logits, full[4:]))
    assert target.loss([full, full], [full[:4], full]) == [pytest.approx(expected, abs=1e-5), None]
    with pytest.raises(ConfigError, match="prompt_token_tensors: got 0, expected 1"):
        target.loss([full], [])
