"""JSON with indents as the standard library writes it, but whole leaves at once, where that goes item by item."""

from __future__ import annotations

import json
from functools import cache, lru_cache
from typing import Any

_STEP = "  "
_CONTAINERS = (dict, list, tuple)


def indented_json(value: Any, margin: str = "\n") -> str:
    """The text of `json.dumps(value, indent=2, ensure_ascii=False)`. margin: what begins a line at this depth."""
    inner = margin + _STEP
    if not isinstance(value, _CONTAINERS) or not value:
        return _encoder(inner).encode(value)
    if not any(isinstance(part, _CONTAINERS) for part in (value.values() if isinstance(value, dict) else value)):
        text = _encoder(inner).encode(value)
        return f"{text[0]}{inner}{text[1:-1]}{margin}{text[-1]}"
    if isinstance(value, dict):
        items = [f"{_key(key)}{indented_json(each, inner)}" for key, each in value.items()]
        return f"{{{inner}{f',{inner}'.join(items)}{margin}}}"
    return f"[{inner}{f',{inner}'.join([indented_json(each, inner) for each in value])}{margin}]"


@cache
def _encoder(inner: str) -> json.JSONEncoder:
    return json.JSONEncoder(ensure_ascii=False, separators=(f",{inner}", ": "))


@lru_cache(maxsize=1024, typed=True)
def _key(key: Any) -> str:
    """What stands before a value, whatever json makes of a key that is no word."""
    return _encoder("").encode({key: 0})[1:-2]
