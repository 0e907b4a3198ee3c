"""`/v1/completions` with log-probabilities, and the tokenizer's endpoints, against the policy itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from servers import Running, openai, running, until

from saffron import SaffronSearch, SearchConfig
from saffron.models.bundled import Models
from saffron.search import Request
from saffron.serving import Settings

TEXT = "please tell me how to bake"


@pytest.fixture(scope="module")
def models() -> Models:
    return tiny.trio()


@pytest.fixture(scope="module")
def server(models: Models) -> Iterator[Running]:
    config = SearchConfig(width=3, max_new_tokens=8, min_new_tokens=0)
    with running(models, Settings(name="tiny", config=config, undefended=True)) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def log_probabilities(models: Models, tokens: list[int]) -> list[list[float]]:
    """Log-probabilities `[tokens - 1, vocab]` of what follows each prefix."""
    return models.policy.logits([tokens[:i] for i in range(1, len(tokens))]).log_softmax(-1).tolist()


def test_log_likelihoods_of_a_prompt(client: Any, models: Models) -> None:
    """As log-likelihood tasks ask: echo, logprobs, one token or none that nobody reads."""
    ids = models.policy.encode(TEXT)
    expected = log_probabilities(models, ids)
    for max_tokens in (0, 1):
        said = client.completions.create(model="tiny", prompt=TEXT, echo=True, logprobs=2, max_tokens=max_tokens)
        choice, logprobs = said.choices[0], said.choices[0].logprobs
        assert choice.text.startswith(TEXT) and said.usage.prompt_tokens == len(ids)
        assert len(logprobs.tokens) == len(ids) + max_tokens and "".join(logprobs.tokens).startswith(TEXT)
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        own = [row[token] for row, token in zip(expected, ids[1:], strict=True)]
        assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(own, abs=1e-4)
        best = [max(top.values()) for top in logprobs.top_logprobs[1 : len(ids)]]
        assert best == pytest.approx([max(row) for row in expected], abs=1e-4)
        assert [TEXT[a:].startswith(t) for a, t in zip(logprobs.text_offset, logprobs.tokens, strict=True)][: len(ids)]
    until(lambda: models.policy.kv.num_nodes == 0)  # a search gives back what it holds after its answer


def test_long_prompts_are_read_in_chunks(models: Models) -> None:
    from saffron.serving.likelihood import likelihoods

    tokens = torch.randint(2, 90, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    found = [one.logprob for one in likelihoods(models.policy, tokens, 1, 0)]
    own = [row[token] for row, token in zip(log_probabilities(models, tokens), tokens[1:], strict=True)]
    assert found == pytest.approx(own, abs=1e-4)


def test_completions_of_text_and_ids(client: Any, models: Models) -> None:
    search = SaffronSearch(models.policy, models.mrm, SearchConfig(width=3, max_new_tokens=6, min_new_tokens=0))
    ids = models.policy.encode(TEXT)
    reward = models.mrm.context_tokens(TEXT)
    (expected,) = search.search([Request(tuple(ids), tuple(reward))])
    both = client.completions.create(model="tiny", prompt=[TEXT, "hello there"], max_tokens=6, logprobs=0)
    assert [c.index for c in both.choices] == [0, 1] and both.choices[0].text == expected.text
    assert len(both.choices[0].logprobs.tokens) == len(expected.token_ids)
    by_ids = client.completions.create(model="tiny", prompt=[ids], max_tokens=6)
    assert by_ids.choices[0].text == expected.text and by_ids.usage.saffron["policy_calls"] > 0
    stream = client.completions.create(model="tiny", prompt=TEXT, max_tokens=6, stream=True, echo=True)
    assert "".join(c.choices[0].text for c in stream) == TEXT + expected.text
    assert len(client.completions.create(model="tiny", prompt=ids, max_tokens=6, n=3).choices) == 3
    undefended = client.completions.create(model="tiny-undefended", prompt=TEXT, max_tokens=4)
    greedy = models.policy.logits([ids]).argmax(-1).tolist()
    assert undefended.choices[0].text.startswith(models.policy.decode(greedy))


@pytest.mark.parametrize("body", [
    {}, {"prompt": ""}, {"prompt": []}, {"prompt": [["a"]]}, {"prompt": [1.5]}, {"prompt": [10**9]}, {"prompt": [True]},
    {"prompt": TEXT, "suffix": "x"}, {"prompt": TEXT, "max_tokens": 0}, {"prompt": TEXT, "logprobs": 21},
    {"prompt": [TEXT] * 65}, {"prompt": [TEXT, TEXT], "stream": True}, {"prompt": "word " * 200},
])  # fmt: skip
def test_wrong_completions_are_refused(body: dict[str, Any], server: Running) -> None:
    with server.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_tokenizer_endpoints(server: Running, models: Models) -> None:
    policy = models.policy
    with server.client() as client:
        said = client.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True}).json()
        assert said["tokens"] == policy.encode(TEXT) and said["count"] == len(said["tokens"])
        assert said["max_model_len"] == policy.context and len(said["token_strs"]) == said["count"]
        assert client.post("/detokenize", json={"tokens": said["tokens"]}).json() == {"prompt": TEXT}
        chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": TEXT}]}).json()
        assert chat["tokens"] == policy.chat(TEXT)
        info = client.get("/tokenizer_info").json()
        assert info["eos_token"] == "</s>" and info["bos_token"] == "<s>" and "assistant" in info["chat_template"]
        for path, body in (
            ("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": []}), ("/detokenize", {"tokens": "a"}),
            ("/detokenize", {"tokens": [-1]}), ("/detokenize", {"tokens": ["x"]}), ("/tokenize", {"prompt": 1}),
        ):  # fmt: skip
            assert client.post(path, json=body).status_code == 400
