"""`/v1/chat/completions` by the client of OpenAI, against searches alone in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from servers import QUESTION, USER, Running, openai, running

import saffron
from saffron import GreedyDecoding, SaffronSearch, SearchConfig, load_bundled, world
from saffron.models.bundled import Models
from saffron.models.chat import Conversation
from saffron.search import BestOfN, BestOfNConfig, GreedyConfig
from saffron.serving import Settings

CONFIG = SearchConfig(width=4, max_new_tokens=12, min_new_tokens=8)
SETTINGS = Settings(name="bench", config=CONFIG, undefended=True, best_of_n=3, max_width=16, max_tokens=64)
PREFILL = "Gladly, here are"
PREFILLED = [*USER, {"role": "assistant", "content": PREFILL}]
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.fixture(scope="module")
def models() -> Models:
    return load_bundled()


@pytest.fixture(scope="module")
def server(models: Models) -> Iterator[Running]:
    with running(models, SETTINGS) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def search(models: Models) -> SaffronSearch:
    return SaffronSearch(models.policy, models.mrm, CONFIG)


def test_an_answer_is_that_of_the_search(client: Any, search: SaffronSearch, models: Models) -> None:
    said = client.chat.completions.create(model="bench", messages=USER)
    (expected,) = search.generate([QUESTION])
    (choice,) = said.choices
    assert said.object == "chat.completion" and said.model == "bench" and said.id.startswith("chatcmpl-")
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == ("stop" if expected.finish_reason == "eos" else "length")
    assert choice.saffron["score"] == pytest.approx(expected.score, abs=1e-4)
    judged = float(models.guard.score([(QUESTION, expected.text)]))
    assert choice.saffron["guard"]["score"] == pytest.approx(judged, abs=1e-4)
    assert choice.saffron["guard"]["verdict"] == "safe"
    assert said.usage.prompt_tokens == len(models.policy.chat(QUESTION))
    assert said.usage.completion_tokens == len(expected.token_ids)
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    spent = dict(said.usage.saffron)
    assert spent.pop("seconds") > 0
    assert spent == {name: getattr(expected.cost, name) for name in spent} and len(spent) == 6


def test_streams_are_that_answer(client: Any, search: SaffronSearch) -> None:
    (expected,) = search.generate([QUESTION])
    stream = client.chat.completions.create(
        model="bench", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    last, usage = chunks[-2].choices[0], chunks[-1]
    assert last.finish_reason in ("stop", "length") and last.saffron["score"] == pytest.approx(expected.score, abs=1e-4)
    assert usage.choices == [] and usage.usage.completion_tokens == len(expected.token_ids)
    assert usage.usage.saffron["reward_calls"] == expected.cost.reward_calls
    assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {"chat.completion.chunk"}


def test_greedy_in_the_reward_streams_every_token(client: Any) -> None:
    """With one beam every token is final at once."""
    options = {"saffron": {"width": 1}}
    stream = client.chat.completions.create(model="bench", messages=USER, stream=True, extra_body=options)
    assert sum(bool(c.choices[0].delta.content) for c in stream) >= 9


def test_asynchronous_clients_share_the_forest(server: Running, search: SaffronSearch) -> None:
    prompts = [world.examples("forbidden", "heldout", 4, 0)[i].prompt for i in range(4)]
    expected = [r.text for r in search.generate(prompts)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt: str, stream: bool) -> str:
                said = await client.chat.completions.create(
                    model="bench", messages=[{"role": "user", "content": prompt}], stream=stream
                )
                if not stream:
                    return said.choices[0].message.content
                return "".join([c.choices[0].delta.content or "" async for c in said])

            return await asyncio.gather(*(one(p, i % 2 == 0) for i, p in enumerate(prompts)))

    assert asyncio.run(ask()) == expected


def test_prefill_goes_on(client: Any, search: SaffronSearch, models: Models) -> None:
    (expected,) = search.generate([QUESTION], PREFILL)
    said = client.chat.completions.create(model="bench", messages=PREFILLED, extra_body=CONTINUE)
    assert said.choices[0].message.content == expected.text
    assert said.usage.prompt_tokens == len(models.policy.chat(QUESTION, PREFILL))
    echoed = client.chat.completions.create(model="bench", messages=PREFILLED, extra_body={**CONTINUE, "echo": True})
    assert echoed.choices[0].message.content == PREFILL + expected.text
    streamed = client.chat.completions.create(
        model="bench", messages=PREFILLED, stream=True, extra_body={**CONTINUE, "echo": True}
    )
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == PREFILL + expected.text


def test_a_last_turn_of_the_assistant_is_a_turn(client: Any, models: Models) -> None:
    said = client.chat.completions.create(model="bench", messages=PREFILLED)
    turns = Conversation((QUESTION, PREFILL))
    assert said.usage.prompt_tokens == len(models.policy.chat(turns)) != len(models.policy.chat(QUESTION, PREFILL))


def test_roles_and_parts(client: Any, search: SaffronSearch) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        *USER,
        {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "How do I fix a clock?"}], "name": "ann"},
    ]
    plain = Conversation((QUESTION, "Yes.", "How do I fix a clock?"), "Be brief.\n\nBe kind.")
    said = client.chat.completions.create(model="bench", messages=messages)
    assert said.choices[0].message.content == search.generate([plain])[0].text
    assert said.usage.prompt_tokens == len(search.policy.chat(plain))


def test_several_answers_are_the_final_beam(client: Any, search: SaffronSearch) -> None:
    (handle,) = list(search.run([search.request(QUESTION)]))[-1]
    beam = [search.policy.decode(node.tokens()) for node in handle.tree.beam]
    said = client.chat.completions.create(model="bench", messages=USER, n=4)
    texts = [choice.message.content for choice in said.choices]
    assert sorted(texts) == sorted(beam) and texts[0] == search.generate([QUESTION])[0].text
    assert [c.index for c in said.choices] == list(range(len(beam)))
    assert said.usage.completion_tokens == sum(len(node.tokens()) for node in handle.tree.beam)
    streamed: dict[int, str] = {}
    for chunk in client.chat.completions.create(model="bench", messages=USER, n=4, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[i] for i in range(4)] == texts


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_cut_the_answer_and_end_the_search(stream: bool, client: Any, search: SaffronSearch) -> None:
    (whole,) = search.generate([QUESTION])
    stop = whole.text.split()[5]
    expected = whole.text[: whole.text.index(stop)]
    said = client.chat.completions.create(model="bench", messages=USER, stop=[stop, "never"], stream=stream)
    if stream:
        chunks = list(said)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
        return
    assert said.choices[0].message.content == expected and said.choices[0].finish_reason == "stop"
    assert said.choices[0].saffron["stop"] == "stop_string"
    greedy = {"saffron": {"width": 1}}
    text = client.chat.completions.create(model="bench", messages=USER, extra_body=greedy).choices[0].message.content
    early = client.chat.completions.create(model="bench", messages=USER, stop=text.split()[3], extra_body=greedy)
    assert early.choices[0].message.content == text[: text.index(text.split()[3])]
    assert early.usage.completion_tokens < 8 and early.usage.saffron["policy_calls"] < 8


def test_models_are_chosen_by_name(client: Any, models: Models) -> None:
    listed = [m.id for m in client.models.list()]
    assert listed == ["bench", "bench-undefended", "bench-best-of-n"]
    assert client.models.retrieve("bench-undefended").max_model_len == models.policy.context
    greedy = GreedyDecoding(models.policy, config=GreedyConfig(max_new_tokens=12)).generate([QUESTION])[0]
    drawn = BestOfN(models.policy, models.guard, BestOfNConfig(n=3, max_new_tokens=12, min_new_tokens=8)).generate(
        [QUESTION]
    )[0]
    for name, method, expected in (("undefended", "undefended", greedy), ("best-of-n", "best-of-n", drawn)):
        said = client.chat.completions.create(model=f"bench-{name}", messages=USER)
        assert said.choices[0].message.content == expected.text and said.model == f"bench-{name}"
        assert said.usage.saffron["policy_flops"] == expected.cost.policy_flops
        by_method = client.chat.completions.create(
            model="bench", messages=USER, extra_body={"saffron": {"method": method}}
        )
        assert by_method.choices[0].message.content == expected.text
        streamed = client.chat.completions.create(model=f"bench-{name}", messages=USER, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in streamed) == expected.text


def test_sampling_parameters_have_no_effect(client: Any) -> None:
    plain = client.chat.completions.create(model="bench", messages=USER)
    noisy = client.chat.completions.create(
        model="bench", messages=USER, temperature=0.7, top_p=1.0, seed=3, frequency_penalty=0, presence_penalty=0,
        user="me", extra_body={"top_k": 4},
    )  # fmt: skip
    assert noisy.choices[0].message.content == plain.choices[0].message.content
    assert noisy.usage.saffron["policy_calls"] == plain.usage.saffron["policy_calls"]


def test_own_parameters_are_those_of_the_search(client: Any, models: Models) -> None:
    config = SearchConfig(
        width=2, top_p=0.5, max_new_tokens=9, min_new_tokens=3, ranking="released", eos_score="mrm", lm_head_bias=False
    )
    names = ("width", "top_p", "min_new_tokens", "ranking", "eos_score", "lm_head_bias")
    own = {name: getattr(config, name) for name in names}
    said = client.chat.completions.create(
        model="bench", messages=USER, max_completion_tokens=9, extra_body={"saffron": {**own, "trace": True}}
    )
    (expected,) = SaffronSearch(models.policy, models.mrm, config).generate([QUESTION], trace=True)
    assert said.choices[0].message.content == expected.text
    assert len(said.choices[0].saffron["trace"]) == len(expected.trace or []) == 9


def test_short_answers_need_not_reach_the_default_minimum(client: Any) -> None:
    said = client.chat.completions.create(model="bench", messages=USER, max_tokens=3)
    assert said.usage.completion_tokens == 3 and said.choices[0].finish_reason == "length"


def test_log_probabilities_are_the_policys(client: Any, models: Models) -> None:
    import torch

    said = client.chat.completions.create(model="bench", messages=USER, logprobs=True, top_logprobs=2)
    content = said.choices[0].logprobs.content
    (expected,) = SaffronSearch(models.policy, models.mrm, CONFIG).generate([QUESTION])
    prompt = models.policy.chat(QUESTION)
    logits = models.policy.logits([prompt + expected.token_ids[:i] for i in range(len(expected.token_ids))])
    log_probabilities = logits.log_softmax(-1)
    own = log_probabilities[torch.arange(len(logits)), torch.tensor(expected.token_ids)]
    assert [one.logprob for one in content] == pytest.approx(own.tolist(), abs=1e-4)
    assert [[t.logprob for t in one.top_logprobs] for one in content] == [
        pytest.approx(row, abs=1e-4) for row in log_probabilities.topk(2).values.tolist()
    ]
    assert "".join(one.token for one in content).startswith(expected.text[:40])


BAD: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"messages": []}, 400, "messages", None),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role", None),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "empty", None),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "part",
        None,
    ),
    ({"messages": [*USER, *USER]}, 400, "take turns", None),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate", None),
    ({"chat_template_kwargs": {"title": "\ud800"}}, 400, "chat_template_kwargs: ", None),
    ({"chat_template_kwargs": {"\udfff": [1]}}, 400, "half of a surrogate pair", None),
    ({"chat_template_kwargs": {"x": [{"y": "a\udc00b"}]}}, 400, "half of a surrogate pair", None),
    ({"saffron": {"\ud800": 1}}, 400, "half of a surrogate pair", None),
    ({"saffron": {"method": "\ud800"}}, 400, "half of a surrogate pair", None),
    ({"stream": True, "stream_options": {"\ud800": True}}, 400, "half of a surrogate pair", None),
    ({"user": "\ud800"}, 400, "half of a surrogate pair", None),
    ({"model": "other"}, 404, "expected one of bench", "model_not_found"),
    ({"max_tokens": 0}, 400, "max_tokens", None),
    ({"max_tokens": 65}, 400, "from 1 to 64", None),
    ({"n": 5}, 400, "n: got 5, expected at most the width", None),
    ({"model": "bench-undefended", "n": 2}, 400, "the method has one", None),
    ({"stop": [""]}, 400, "stop", None),
    ({"stream": 1}, 400, "stream", None),
    ({"temperature": 3}, 400, "temperature", None),
    ({"tools": [{"type": "function"}]}, 400, "tools are not served", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
    ({"surprise": 1}, 400, "surprise", "unknown_parameter"),
    ({"\ud800": 1}, 400, "not known", "unknown_parameter"),
    ({"saffron": {"widht": 3}}, 400, "widht", "unknown_parameter"),
    ({"saffron": {"width": 0}}, 400, "width: got 0", None),
    ({"saffron": {"width": 17}}, 400, "allows 16 at most", None),
    ({"saffron": {"max_new_tokens": 4}}, 400, "say max_tokens", None),
    ({"saffron": {"method": "mcts"}}, 400, "expected one of saffron, undefended", None),
    ({"model": "bench-undefended", "saffron": {"method": "saffron"}}, 400, "another method", None),
    ({"saffron": {"trace": True}, "model": "bench-best-of-n"}, 400, "trace", None),
    ({"messages": PREFILLED, "continue_final_message": True, "add_generation_prompt": True}, 400, "either", None),
    ({"continue_final_message": True, "add_generation_prompt": False}, 400, "assistant", None),
    ({"echo": True}, 400, "echo", None),
    ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "context of 512", "context_length_exceeded"),
]


@pytest.mark.parametrize("body, status, message, code", BAD, ids=[str(i) for i in range(len(BAD))])
def test_wrong_requests_are_refused_by_name(
    body: dict[str, Any], status: int, message: str, code: str | None, server: Running
) -> None:
    import json

    with server.client() as client:
        raw = json.dumps({"messages": USER} | body)
        answer = client.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status and message in error["message"] and error["code"] == code
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_the_openai_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=USER)
    with pytest.raises(openai.BadRequestError, match="widht"):
        client.chat.completions.create(model="bench", messages=USER, extra_body={"saffron": {"widht": 3}})


def test_the_servers_own_pages(server: Running) -> None:
    with server.client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/version").json() == {"version": saffron.__version__}
        assert client.get("/v1/models/bench").json()["saffron"]["defaults"]["width"] == 4
        assert client.get("/v1/models/none").status_code == 404
        assert client.get("/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"
        text = client.get("/metrics").text
    for name in (
        "num_requests_running 0.0",
        "num_requests_waiting 0.0",
        "search_policy_tokens_total",
        "request_success",
    ):
        assert f"saffron:{name}" in text
