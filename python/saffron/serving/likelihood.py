"""Log-probabilities of tokens under the policy alone, by a second pass: no search enters them."""

from __future__ import annotations

from typing import Any

from saffron.models.likelihood import likelihoods
from saffron.models.policy import Policy
from saffron.serving.ask import Ask
from saffron.serving.running import Choice
from saffron.serving.service import Service


def token_text(policy: Policy, token: int) -> str:
    """What one token says; control tokens are shown."""
    return str(policy.require_tokenizer().decode([token]))


def chat_logprobs(service: Service, ask: Ask, choice: Choice) -> dict[str, Any]:
    """`choices[i].logprobs` of a chat completion."""
    policy = service.policy
    assert ask.logprobs is not None
    before = list(ask.request.policy)

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(policy, token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    found = likelihoods(policy, before + choice.tokens, len(before), ask.logprobs)
    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(token, value) for token, value in one.top]}
        for one in found
    ]
    return {"content": content, "refusal": None}
