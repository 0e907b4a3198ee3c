"""What runs within a capture has run before it: no kernel is compiled, loaded or specialised there first."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_host
import pytest
import tiny
import torch
from searches import CONFIG, REQUESTS, make
from torch import Tensor

from saffron.models import cuda_graph
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import captured_step, model_pair, static_forest
from saffron.search.captured_step import why_not_captured
from saffron.search.model_pair import ModelPair
from saffron_kernels import backend as use_backend
from saffron_kernels import schemas
from saffron_kernels.backends import cuda, faults
from saffron_kernels.backends.cuda import counters


def first_met_within_a_capture(
    monkeypatch: pytest.MonkeyPatch, architecture: str, met: Callable[[], set[object]], prompts: int = 2
) -> list[object]:
    """Searches prompts in captured steps; `met` is what has been launched so far. Ends that are banned at first."""
    within: list[set[object]] = []

    def capture(body: Callable[[], object]) -> Callable[[], object]:
        before = set(met())
        body()
        within.append(set(met()) - before)
        replays = iter([lambda: None])
        return lambda: next(replays, body)()

    policy = Policy(tiny.model(architecture, num_hidden_layers=1).bfloat16())  # layers launch the same kernels
    mrm = MultifurcationRewardModel(tiny.model(seed=1, num_hidden_layers=1).bfloat16())
    config = replace(CONFIG, width=3, max_new_tokens=2 + 2 * prompts, min_new_tokens=1 + prompts)
    make(monkeypatch, capture, policy, mrm, config).search(REQUESTS[:prompts])
    assert within and met(), "nothing was captured"
    return [each for found in within for each in found]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_cuda_kernels_are_launched_before(architecture, monkeypatch) -> None:
    monkeypatch.setenv("SAFFRON_CUDA_HOST", cuda_host.module())
    monkeypatch.setattr(faults, "eager", lambda tensor: False)
    library = ctypes.CDLL(cuda_host.module())
    library.saffron_launches.restype = ctypes.c_char_p
    library.saffron_forget_launches()
    schemas.forget_choices()
    with use_backend("cuda"):
        found = first_met_within_a_capture(
            monkeypatch, architecture, lambda: set(library.saffron_launches().split(b"\n"))
        )
    assert found == []


def specialisation(kernel: object, arguments: tuple[object, ...], options: dict[str, object]) -> object:
    """What makes Triton compile a kernel again: dtypes, None, alignment, integers (1, multiples of 16), constants."""
    fixed = kernel.kwargs.get("do_not_specialize") or ()  # type: ignore[attr-defined]
    key: list[object] = [kernel.fn.__name__]  # type: ignore[attr-defined]
    for name, x in zip(kernel.arg_names, arguments, strict=False):  # type: ignore[attr-defined]
        if isinstance(x, Tensor):
            key.append((x.dtype, x.data_ptr() % 16 == 0))
        elif isinstance(x, int):
            key.append("int" if name in fixed else ("int", x == 1, x % 16 == 0, abs(x) >= 1 << 31))
        else:
            key.append(type(x))
    return (*key, *sorted((name, str(x)) for name, x in options.items()))


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> set[object]:
    """The specialisations of Triton's kernels that a test meets."""
    pytest.importorskip("triton")
    from saffron_kernels.backends.triton import launch as launches

    if not launches.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    met: set[object] = set()

    def noted(kernel: object, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
        met.add(specialisation(kernel, arguments, options))
        original(kernel, grid, *arguments, **options)

    original = launches.launch
    for name, module in list(sys.modules.items()):
        ours = name.startswith("saffron_kernels.backends.triton") and isinstance(module, ModuleType)
        if ours and getattr(module, "launch", None) is original:
            monkeypatch.setattr(module, "launch", noted)
    return met


def test_sizes_do_not_specialise_triton_kernels(met) -> None:
    """1 and multiples of 16 would."""
    from saffron_kernels.backends import triton

    for tokens, queries, new in ((16, 2, 1), (17, 16, 16), (1, 1, 3), (48, 5, 2)):
        begin = torch.zeros(tokens, dtype=torch.int32)
        slots = torch.arange(new, dtype=torch.int32)
        parents = slots.clamp(max=queries - 1)
        triton.advance_tree(begin, begin, begin + queries, parents, slots, queries, None)
    assert len(met) == 1


@pytest.mark.parametrize("architecture", ["qwen3"])  # interpreted, each architecture takes half a minute
def test_triton_kernels_are_specialised_before(architecture, met, monkeypatch) -> None:
    schemas.forget_choices()
    with use_backend("triton"):
        found = first_met_within_a_capture(monkeypatch, architecture, lambda: met, prompts=1)
    assert found == []


def test_counters_of_a_graph_live_as_long_as_its_capture(monkeypatch) -> None:
    """One tensor a stream: a service that captures again, for other sizes, does not keep those of before."""
    graph = 0
    launchers = SimpleNamespace(COUNTERS=8, capture_id=lambda stream: graph)
    monkeypatch.setattr(cuda.native, "module", lambda tensor: launchers)
    monkeypatch.setattr(counters, "_counters", {})
    monkeypatch.setattr(counters, "_graphs", {})
    own = torch.zeros(1)
    eager = counters.counters(own)
    assert counters.counters(own) is eager
    graph = 7
    captured = counters.counters(own)
    assert captured is not eager and counters.counters(own) is captured
    graph = 8
    assert counters.counters(own) is not captured and len(counters._counters) == 1


def test_branches_of_a_graph_have_counters_of_their_own(monkeypatch) -> None:
    """Policy and MRM run at once: launches of theirs must not count together."""
    streams = {"now": 1}
    launchers = SimpleNamespace(COUNTERS=8, capture_id=lambda stream: 7)
    monkeypatch.setattr(cuda.native, "module", lambda tensor: launchers)
    monkeypatch.setattr(cuda.native, "stream", lambda tensor: streams["now"])
    monkeypatch.setattr(counters, "_counters", {})
    monkeypatch.setattr(counters, "_graphs", {})
    own = torch.zeros(1)
    main = counters.counters(own)
    streams["now"] = 2
    side = counters.counters(own)
    assert side.data_ptr() != main.data_ptr() and counters.counters(own) is side
    streams["now"] = 1
    assert counters.counters(own) is main


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models say that they are there, and any two fit each other."""
    for model in (Policy, MultifurcationRewardModel):
        monkeypatch.setattr(model, "device", torch.device("cuda"))
    monkeypatch.setattr(ModelPair, "__init__", lambda self, policy, mrm: self.__dict__.update(policy=policy, mrm=mrm))
    monkeypatch.setattr(ModelPair, "same", True, raising=False)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_not_captured(rope_type, monkeypatch) -> None:
    """Its frequencies are chosen on the host in every step, by the longest position."""
    factors = [1.0] * (tiny.model().config.head_dim // 2)
    more = {"dynamic": {}, "longrope": {"short_factor": factors, "long_factor": factors}}[rope_type]
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, **more}
    models = [
        [kind(tiny.model(**c)) for c in ({}, {"rope_parameters": rope})]
        for kind in (Policy, MultifurcationRewardModel)
    ]  # fmt: skip
    (policy, scaled_policy), (mrm, scaled_mrm) = models
    on_a_gpu(monkeypatch)
    assert why_not_captured(ModelPair(policy, mrm), CONFIG) is None
    for pair, name in (((policy, scaled_mrm), "MRM"), ((scaled_policy, mrm), "policy")):
        assert f"the {name}'s RoPE depends on the text's length" in str(why_not_captured(ModelPair(*pair), CONFIG))


def test_fp8_caches_that_only_the_reference_reads_are_not_captured(monkeypatch) -> None:
    pair = Policy(tiny.model()), MultifurcationRewardModel(tiny.model(seed=1))
    on_a_gpu(monkeypatch)
    serving = {"name": "cuda"}
    monkeypatch.setattr(captured_step.backends, "chosen", lambda *asked: serving["name"])
    monkeypatch.setattr(captured_step, "FP8", pair[1].kv.k.dtype)  # as if the caches were in it
    assert why_not_captured(ModelPair(*pair), CONFIG) is None
    serving["name"] = "reference"
    assert "no kernel here reads fp8 caches" in str(why_not_captured(ModelPair(*pair), CONFIG))


def test_a_capture_that_fails_says_why_and_leaves_the_stream(monkeypatch) -> None:
    class Failing:
        def __init__(self, graph: object, capture_error_mode: str) -> None:
            assert capture_error_mode == "thread_local"

        def __enter__(self) -> None:
            now.append("capturing")

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    def body() -> None:
        try:
            raise KeyError("on the way to what is refused")
        except KeyError:
            raise failure  # noqa: B904 (another error is its context)

    failure: BaseException = RuntimeError("operation not permitted when stream is capturing")
    now = ["own"]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", now.append)
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        cuda_graph.capture_on_gpu(body)
    assert now == ["own", "capturing", "own"]
    failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        cuda_graph.capture_on_gpu(body)
    assert now[-1] == "own"


def test_one_capture_at_a_time(monkeypatch) -> None:
    """PyTorch has one stream for all captures: a second thread waits, with a step before its capture as well."""
    running, most = [], []

    def body() -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *given, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    before = functools.partial(cuda_graph.run_before_capture, body, torch.device("cpu"))
    within = functools.partial(cuda_graph.capture_on_gpu, body)
    threads = [threading.Thread(target=target) for target in 3 * [before, within]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6


class Streams:
    """The streams of a GPU that is not there: what was called, on which of them, and who waited for whom."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = "first", list[tuple[str, ...]]()
        first, self.second = self._stream("first"), self._stream("second")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: first)
        monkeypatch.setattr(torch.cuda, "stream", self._use)

    def _stream(self, name: str) -> Any:
        wait = lambda other: self.calls.append((name, "waits for", other.name))  # noqa: E731
        return SimpleNamespace(name=name, device="cuda", wait_stream=wait)

    @contextlib.contextmanager
    def _use(self, stream: SimpleNamespace) -> Iterator[None]:
        self.now = stream.name
        try:
            yield
        finally:
            self.now = "first"

    def call(self, what: str) -> str:
        self.calls.append((self.now, what))
        return what


def test_two_calls_at_once(monkeypatch) -> None:
    """The second stream begins after what was launched before, and what follows waits for it; on a CPU there is one."""
    streams = Streams(monkeypatch)
    calls = (lambda: streams.call("policy")), (lambda: streams.call("MRM"))
    order = [
        ("second", "waits for", "first"), ("second", "MRM"), ("first", "policy"), ("first", "waits for", "second"),
    ]  # fmt: skip
    assert cuda_graph.at_once(streams.second, *calls) == ["policy", "MRM"] and streams.calls == order

    def fail(error: BaseException) -> None:
        raise error

    for error in (torch.OutOfMemoryError(), KeyboardInterrupt()):
        failing = functools.partial(fail, error)
        for pair in ((failing, calls[1]), (calls[0], failing)):
            streams.calls.clear()
            with pytest.raises(type(error)):
                cuda_graph.at_once(streams.second, *pair)
            assert streams.calls == [order[0], *[order[1]] * (pair[1] is calls[1]), order[3]]

    streams.calls.clear()
    assert cuda_graph.at_once(None, *calls) == ["policy", "MRM"]
    assert streams.calls == [("first", "policy"), ("first", "MRM")]


def test_policy_and_mrm_run_at_once_in_a_captured_step(monkeypatch) -> None:
    """Each forest has a stream of its own for that: several threads may search with the same models."""
    policy, mrm = tiny.pair(1)
    forks: list[list[str]] = []
    sides: list[object] = []

    def at_once(side: object, on_main: Callable[[], Tensor], on_side: Callable[[], Tensor]) -> list[Tensor]:
        forks.append([])
        sides.append(side)
        return [on_main(), on_side()]

    for model, name in ((policy, "policy"), (mrm, "MRM")):
        run = model.output

        def noted(*x: object, run: Callable[..., Tensor] = run, name: str = name) -> Tensor:
            for fork in forks[-1:]:  # none yet where prompts are read
                fork.append(name)
            return run(*x)

        monkeypatch.setattr(model, "output", noted)
    monkeypatch.setattr(model_pair, "at_once", at_once)
    monkeypatch.setattr(static_forest, "side_stream", lambda device: object())
    config = replace(CONFIG, width=2, max_new_tokens=3)
    make(monkeypatch, None, policy, mrm, config).search(REQUESTS[:1])
    assert forks == [["policy", "MRM"]] * len(forks) and len(forks) >= 2 and set(sides) == {sides[0]} != {None}
    forks.clear()
    make(monkeypatch, None, policy, mrm, config).search(REQUESTS[:1])
    assert sides[-1] is not sides[0]


def test_there_is_a_second_stream_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    assert cuda_graph.side_stream(torch.device("cuda", 1)) == "a stream of cuda:1"
    assert cuda_graph.side_stream(torch.device("cpu")) is None
