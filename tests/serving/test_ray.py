"""Replicas by Ray Serve: what configures them; and, where asked for, two of them on this machine."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers import USER, httpx

from saffron import SaffronSearch, SearchConfig, load_bundled
from saffron.errors import CheckpointError, ConfigError
from saffron.serving.ray import read_options

OPTIONS = {"replicas": [2, 2], "name": "bench", "config": {"width": 2, "max_new_tokens": 8}, "undefended": True}


def test_options() -> None:
    files, settings, replicas = read_options(json.dumps(OPTIONS))
    assert files.policy is None and replicas == [2, 2]
    assert settings.name == "bench" and settings.undefended and settings.config.width == 2
    assert read_options("")[2] == [1, 1]


@pytest.mark.parametrize("options, error", [
    ("[", ConfigError), ("[]", ConfigError), ('{"widht": 3}', ConfigError), ('{"replicas": [2, 1]}', ConfigError),
    ('{"config": {"width": 0}}', ConfigError), ('{"policy": "./none"}', CheckpointError),
])  # fmt: skip
def test_wrong_options(options: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        read_options(options)


@pytest.mark.skipif("SAFFRON_TEST_RAY" not in os.environ, reason="starts a Ray cluster: SAFFRON_TEST_RAY=1")
def test_two_replicas_answer_as_a_lone_search() -> None:
    pytest.importorskip("ray")
    import ray
    from ray import serve

    from saffron.serving.ray import application

    models = load_bundled()
    search = SaffronSearch(models.policy, models.mrm, SearchConfig(width=2, max_new_tokens=8, min_new_tokens=8))
    (expected,) = search.generate([USER])
    ray.init(num_cpus=4, include_dashboard=False)
    try:
        serve.start(http_options={"port": 8123})
        serve.run(application(json.dumps(OPTIONS)), name="saffron")
        with httpx.Client(base_url="http://127.0.0.1:8123", timeout=300) as client:

            def ask(stream: bool) -> str:
                said = client.post("/v1/chat/completions", json={"messages": USER, "stream": stream})
                if not stream:
                    return said.json()["choices"][0]["message"]["content"]
                events = [json.loads(x[6:]) for x in said.text.split("\n\n") if x.startswith("data: {")]
                return "".join(e["choices"][0]["delta"].get("content") or "" for e in events)

            with ThreadPoolExecutor(4) as pool:
                assert set(pool.map(ask, [False, True] * 4)) == {expected.text}
            assert client.get("/v1/models").json()["data"][1]["id"] == "bench-undefended"
    finally:
        serve.shutdown()
        ray.shutdown()
