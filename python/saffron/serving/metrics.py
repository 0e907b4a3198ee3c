"""Metrics for Prometheus: names like vLLM's behind `saffron:`, and what a search costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from saffron.search.result import Cost

if TYPE_CHECKING:
    from saffron.serving.service import Service

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)


class Metrics:
    """What a server counts."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Load(service))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"saffron:{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"saffron:{name}", text, ["model_name"], buckets=SECONDS, registry=self.registry)

        self.prompt = counter("prompt_tokens", "Tokens of prompts", "model_name")
        self.generation = counter("generation_tokens", "Tokens of answers", "model_name")
        self.success = counter("request_success", "Requests that were answered", "model_name", "finished_reason")
        self.errors = counter("request_errors", "Requests that were not answered", "code")
        self.cancelled = counter("requests_cancelled", "Requests whose client went away")
        self.policy_tokens = counter("search_policy_tokens", "Tokens that ran through the policy", "model_name")
        self.reward_tokens = counter("search_reward_tokens", "Tokens that ran through the reward model", "model_name")
        self.flops = counter("search_flops", "FLOPs of both models, each request as if alone", "model_name")
        self.latency = histogram("e2e_request_latency_seconds", "From the request to the end of its answer")
        self.first = histogram("time_to_first_token_seconds", "From the request to the first text that is final")

    def answered(self, model: str, prompt: int, tokens: int, reason: str, cost: Cost, seconds: float) -> None:
        """Counts one request."""
        self.prompt.labels(model).inc(prompt)
        self.generation.labels(model).inc(tokens)
        self.success.labels(model, reason).inc()
        self.policy_tokens.labels(model).inc(cost.policy_tokens)
        self.reward_tokens.labels(model).inc(cost.reward_tokens)
        self.flops.labels(model).inc(cost.flops)
        self.latency.labels(model).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Load(Collector):
    """What is read from the engine when it is asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[GaugeMetricFamily]:
        engine, models = self._service.engine, self._service.models
        running, waiting = (0, 0) if engine is None else (engine.running, engine.waiting)
        yield GaugeMetricFamily("saffron:num_requests_running", "Requests in the forest", running)
        yield GaugeMetricFamily("saffron:num_requests_waiting", "Requests in the queue", waiting)
        used = GaugeMetricFamily("saffron:kv_cache_tokens", "Slots of the trie cache in use", labels=["model"])
        size = GaugeMetricFamily("saffron:kv_cache_capacity_tokens", "Slots of the trie cache", labels=["model"])
        for name, model in (("policy", models.policy), ("mrm", models.mrm)) if models is not None else ():
            used.add_metric([name], model.kv.num_nodes)
            size.add_metric([name], model.kv.capacity)
        yield from (used, size)
