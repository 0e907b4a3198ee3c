"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from saffron.errors import shown
from saffron.serving.body import Fields, read_json
from saffron.serving.chat import conversation_of
from saffron.serving.completions import with_begin
from saffron.serving.errors import bad
from saffron.serving.service import Service

TOKENIZE = frozenset((
    "model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "continue_final_message",
    "return_token_strs",
))  # fmt: skip


async def tokenize(request: Request) -> JSONResponse:
    """POST /tokenize: `{"prompt": TEXT}` or `{"messages": [...]}` to token ids of the policy."""
    service: Service = request.app.state.service
    policy = service.ready()[0].policy
    fields = Fields(await read_json(request, service.settings.max_body), TOKENIZE, {})
    special, strings = fields.flag("add_special_tokens", True), fields.flag("return_token_strs")
    if ("prompt" in fields) == ("messages" in fields):
        raise bad("prompt", "expected a prompt or messages")
    conversation = conversation_of(fields, service.settings) if "messages" in fields else None
    prompt = fields.text("prompt")

    def encode() -> list[int]:
        if conversation is not None:
            return policy.chat(conversation)
        if not prompt:
            return []
        return with_begin(service, prompt) if special else policy.encoder.text(prompt)

    ids = await service.work(encode)
    pieces = policy.require_tokenizer().convert_ids_to_tokens(ids) if strings else None
    return JSONResponse({
        "count": len(ids), "max_model_len": policy.context, "tokens": ids, "token_strs": pieces
    })  # fmt: skip


async def detokenize(request: Request) -> JSONResponse:
    """POST /detokenize: `{"tokens": [...]}` to text; control tokens are shown."""
    service: Service = request.app.state.service
    policy = service.ready()[0].policy
    fields = Fields(await read_json(request, service.settings.max_body), frozenset(("model", "tokens")), {})
    tokens = fields.get("tokens")
    if not isinstance(tokens, list):
        raise bad("tokens", f"got {shown(tokens)}, expected token ids")
    if tokens:
        policy.check_tokens("tokens", tokens)
    text = await service.work(lambda: str(policy.require_tokenizer().decode(tokens)))
    return JSONResponse({"prompt": text})


async def tokenizer_info(request: Request) -> JSONResponse:
    """GET /tokenizer_info: what clients need that render prompts themselves."""
    service: Service = request.app.state.service
    policy = service.ready()[0].policy
    tokenizer = policy.require_tokenizer()
    info: dict[str, Any] = {
        f"{name}_token": getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad", "unk")
    }
    return JSONResponse(info | {
        "tokenizer_class": type(tokenizer).__name__, "vocab_size": len(tokenizer),
        "model_max_length": policy.context, "chat_template": tokenizer.chat_template,
    })  # fmt: skip
