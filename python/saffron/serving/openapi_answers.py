"""What the operations of a server answer, as JSON Schema."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from saffron.search.result import Cost

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}


def whole(least: int, most: int | None = None) -> Schema:
    return {"type": "integer", "minimum": least} | ({} if most is None else {"maximum": most})


def array(items: Schema, least: int = 1, most: int | None = None) -> Schema:
    return {"type": "array", "items": items, "minItems": least} | ({} if most is None else {"maxItems": most})


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]} if schema else schema


def record(properties: Schema, *optional: str) -> Schema:
    """An object of these keys and no others, all of them there but for the optional ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


COUNT = whole(0)
SPENT = record({field.name: NUMBER if field.name == "seconds" else COUNT for field in fields(Cost)})
USAGE = record(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT, "saffron": SPENT}, "saffron"
)  # fmt: skip
OWN = record({
    "score": NUMBER, "stop": {"enum": ["eos", "length", "stop_string"]},
    "guard": record({"score": NUMBER, "verdict": {"enum": ["safe", "unsafe"]}}),
    "widths": array(whole(1)), "trace": {}, "page": TEXT,
}, "guard", "widths", "trace", "page")  # fmt: skip
HEAD = {"id": TEXT, "created": COUNT, "model": TEXT, "system_fingerprint": TEXT}
LIKELY = {"token": TEXT, "logprob": NUMBER, "bytes": array(whole(0, 255), 0)}
ENDED = {"enum": ["stop", "length"]}

CHAT = record({
    **HEAD, "object": {"const": "chat.completion"}, "usage": USAGE,
    "choices": array(record({
        "index": COUNT, "finish_reason": ENDED, "saffron": OWN,
        "message": record({"role": {"const": "assistant"}, "content": TEXT, "refusal": {"type": "null"}}),
        "logprobs": or_null(record({
            "content": array(record({**LIKELY, "top_logprobs": array(record(LIKELY), 0)}), 0),
            "refusal": {"type": "null"},
        })),
    })),
})  # fmt: skip
COMPLETION = record({
    **HEAD, "object": {"const": "text_completion"}, "usage": USAGE,
    "choices": array(record({
        "index": COUNT, "finish_reason": ENDED, "saffron": OWN, "text": TEXT,
        "logprobs": or_null(record({
            "tokens": array(TEXT, 0), "token_logprobs": array(or_null(NUMBER), 0), "text_offset": array(COUNT, 0),
            "top_logprobs": array(or_null({"type": "object", "additionalProperties": NUMBER}), 0),
        })),
    }, "saffron")),
})  # fmt: skip
MODEL = record({
    "id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT, "root": TEXT, "parent": or_null(TEXT),
    "max_model_len": or_null(COUNT), "saffron": record({"method": TEXT, "defaults": {"type": "object"}}),
})  # fmt: skip
MODELS = record({"object": {"const": "list"}, "data": array(MODEL)})
TOKENIZED = record({
    "count": COUNT, "max_model_len": or_null(COUNT), "tokens": array(COUNT, 0), "token_strs": or_null(array(TEXT, 0)),
})  # fmt: skip
DETOKENIZED = record({"prompt": TEXT})
TOKENIZER = record({
    **{f"{name}_token": or_null(TEXT) for name in ("bos", "eos", "pad", "unk")}, "tokenizer_class": TEXT,
    "vocab_size": COUNT, "model_max_length": or_null(COUNT), "chat_template": {},
})  # fmt: skip
VERSION = record({"version": TEXT})
ERROR = record({"error": record({"message": TEXT, "type": TEXT, "param": or_null(TEXT), "code": or_null(TEXT)})})
