"""Whether a value is as a JSON Schema says: the part of JSON Schema that the server's OpenAPI document uses."""

from __future__ import annotations

import json
from typing import Any

TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip
KEYS = {
    "type", "enum", "const", "anyOf", "minimum", "maximum", "exclusiveMinimum", "minItems", "maxItems", "minLength",
    "items", "properties", "required", "additionalProperties", "description",
}  # fmt: skip


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Raises AssertionError for a schema that says what this does not read."""
    assert schema.keys() <= KEYS, schema
    same = json.dumps(value, sort_keys=True)
    if "enum" in schema and same not in [json.dumps(one, sort_keys=True) for one in schema["enum"]]:
        return False
    if "const" in schema and same != json.dumps(schema["const"], sort_keys=True):
        return False
    if "anyOf" in schema and not any(fits(value, one) for one in schema["anyOf"]):
        return False
    kind = schema.get("type")
    if kind is not None and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if isinstance(value, dict):
        return _object_fits(value, schema)
    if isinstance(value, list):
        count = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return count and all(fits(one, schema.get("items", {})) for one in value)
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0)
    if isinstance(value, int | float) and not isinstance(value, bool):
        least, most = schema.get("minimum", value), schema.get("maximum", value)
        return bool(least <= value <= most and value > schema.get("exclusiveMinimum", value - 1))
    return True


def _object_fits(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not set(schema.get("required", ())) <= value.keys():
        return False
    for name, one in value.items():
        if name in known:
            if not fits(one, known[name]):
                return False
        elif others is False or (isinstance(others, dict) and not fits(one, others)):
            return False
    return True
