"""`NAME-adaptive`: widths by a file of state, verdicts counted, the file written again; over tiny random models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from servers import USER, Running, running

from saffron import AdaptiveSearch, AdaptiveWidth, SearchConfig, WidthSettings
from saffron.errors import CheckpointError, ConfigError
from saffron.models.bundled import Models
from saffron.models.chat import Conversation
from saffron.search.result import Cost
from saffron.serving import Settings
from saffron.serving.ask import variants
from saffron.serving.routes import own_part
from saffron.serving.running import Choice

CONFIG = SearchConfig(width=2, max_new_tokens=6, min_new_tokens=6)
WIDTHS = WidthSettings(widths=(1, 3), phases=2, phase_tokens=2, wide=3)


@pytest.fixture(scope="module")
def models() -> Models:
    return tiny.trio()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    AdaptiveWidth(WIDTHS).save(tmp_path / "state.npz")
    return tmp_path / "state.npz"


@pytest.fixture
def server(models: Models, state: Path) -> Iterator[Running]:
    with running(models, Settings(name="tiny", config=CONFIG, adaptive=state, max_width=4)) as made:
        yield made


def counted(state: Path) -> int:
    return sum(row["requests"] for row in AdaptiveWidth.load(state).status())


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_those_of_the_adaptive_search_and_count(
    stream: bool, models: Models, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = AdaptiveSearch(models.policy, models.mrm, models.guard, AdaptiveWidth.load(state), CONFIG)
    (expected,) = search.answer(USER[0]["content"])
    with running(models, Settings(name="tiny", config=CONFIG, adaptive=state, max_width=4)) as server:
        said = server.ask(model="tiny-adaptive", stream=stream)
        if stream:
            events = [json.loads(line[6:]) for line in said.text.splitlines() if line.startswith("data: {")]
            text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
            own = events[-1]["choices"][0]["saffron"]
        else:
            text, own = said.json()["choices"][0]["message"]["content"], said.json()["choices"][0]["saffron"]
        assert text == expected.result.text
        assert own["widths"] == list(expected.logged.widths) == [3, 3]
        assert (own["guard"]["verdict"] == "safe") is expected.logged.safe
        assert server.ask(model="tiny").json()["choices"][0]["saffron"].get("widths") is None
        assert counted(state) == 0
        monkeypatch.setattr("saffron.serving.service.SAVE_EVERY", -1.0)
        server.ask(saffron={"method": "adaptive"})
        assert counted(state) == 2  # while it serves
        monkeypatch.undo()
        server.ask(model="tiny-adaptive", max_tokens=3)
        assert counted(state) == 2
    assert counted(state) == 3  # at its end


def test_servers_that_share_a_file_add(models: Models, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(name="tiny", config=CONFIG, adaptive=state, max_width=4)
    monkeypatch.setattr("saffron.serving.service.SAVE_EVERY", -1.0)
    with running(models, settings) as one, running(models, settings) as other:
        for server, expected in ((one, 1), (other, 2), (other, 3), (one, 4)):
            assert server.ask(model="tiny-adaptive").status_code == 200
            assert counted(state) == expected
        adaptive = one.service.variants["tiny-adaptive"].adaptive
        assert adaptive is not None and sum(row["requests"] for row in adaptive.adaptive.status()) == 4
    assert counted(state) == 4


def test_a_state_that_cannot_be_written_costs_no_answer(
    models: Models, state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("saffron.serving.service.SAVE_EVERY", -1.0)
    with running(models, Settings(name="tiny", config=CONFIG, adaptive=state, max_width=4)) as server:
        moved = state.parent.rename(state.parent.with_name("moved"))
        assert server.ask(model="tiny-adaptive").status_code == 200
        assert "state.npz: cannot be written" in caplog.text
        moved.rename(state.parent)
        assert server.ask(model="tiny-adaptive").status_code == 200
        assert counted(state) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_usage_has_what_the_guard_read(stream: bool, models: Models, state: Path) -> None:
    """Prompt and prefill before the search, the answer after it: as `AdaptiveSearch` counts them, and the metrics."""
    search = AdaptiveSearch(models.policy, models.mrm, models.guard, AdaptiveWidth.load(state), CONFIG)
    (expected,) = search.answer(USER[0]["content"], "the quick")
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    messages = [*USER, {"role": "assistant", "content": "the quick"}]
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    with running(models, Settings(name="tiny", config=CONFIG, adaptive=state, max_width=4)) as server:
        said = server.ask(model="tiny-adaptive", messages=messages, **goes_on, **more)
        counted = server.service.metrics.text().decode()
    body = json.loads(said.text.split("data: ")[-2]) if stream else said.json()
    spent = body["usage"]["saffron"]
    assert Cost(**spent) == expected.result.cost
    assert f'search_reward_tokens_total{{model_name="tiny-adaptive"}} {float(spent["reward_tokens"])}' in counted


def test_an_answer_that_the_guard_could_not_judge_costs_one_reading(models: Models, state: Path) -> None:
    search = AdaptiveSearch(models.policy, models.mrm, models.guard, AdaptiveWidth.load(state), CONFIG)
    nothing, conversation = Cost(0, 0, 0, 0, 0, 0), Conversation.of(USER)
    read = search.with_guard(nothing, conversation, None)
    assert (read.reward_calls, read.reward_tokens) == (1, len(models.guard.sequence(conversation, "")))


@pytest.mark.parametrize("score, verdict", [(-0.1, "unsafe"), (0.0, "safe"), (0.1, "safe")])
def test_a_guard_that_leans_neither_way_is_no_alarm(score: float, verdict: str) -> None:
    """The bound of the judges and of the adaptive widths."""
    assert own_part(Choice("", [], 0.0, "eos"), score)["guard"]["verdict"] == verdict


def test_what_requests_cannot_say(server: Running) -> None:
    fixed = server.ask(model="tiny-adaptive", saffron={"width": 2})
    assert fixed.status_code == 400 and "'width'" in fixed.json()["error"]["message"]
    with server.client() as client:
        plain = client.post("/v1/completions", json={"model": "tiny-adaptive", "prompt": "hello"})
    assert plain.status_code == 400 and plain.json()["error"]["code"] == "unsupported_parameter"
    turns = [*USER, {"role": "assistant", "content": "hello"}]
    assert server.ask(model="tiny-adaptive", messages=turns).status_code == 400


def test_servers_that_cannot_be(models: Models, state: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="guard"):
        variants(models._replace(guard=None), Settings(adaptive=state))
    with pytest.raises(ConfigError, match="widest search is 3"):
        variants(models, Settings(config=CONFIG, adaptive=state, max_width=2))
    with pytest.raises(CheckpointError):
        variants(models, Settings(adaptive=tmp_path / "none.npz"))
