"""The `config_groups` of compressed-tensors' quantization_config: one scheme for all linears, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awqkit.errors import CheckpointError
from awqkit.formats.scheme import Scheme, listed
from awqkit.recipe import PER_CHANNEL

READ_BITS = range(2, 9)
_TOKEN_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_DEFAULTS = {"type": "int", "symmetric": True, "dynamic": False}  # the library's, for keys that a config leaves out


def written_group(scheme: Scheme, layout: str) -> dict[str, Any]:
    """The one group of a checkpoint: every Linear, in this scheme."""
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric}
    if scheme.group_size == PER_CHANNEL:
        weights |= {"strategy": "channel", "dynamic": False}
    else:
        weights |= {"strategy": "group", "group_size": scheme.group_size, "dynamic": False}
    group = {"targets": ["Linear"], "format": layout, "weights": weights}
    return group if scheme.activations == "none" else {**group, "input_activations": dict(_TOKEN_ACTIVATIONS)}


def read_scheme(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`. Raises CheckpointError for what would be misread."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        count = len(groups) if isinstance(groups, Mapping) else 0
        raise CheckpointError(f"quantization_config has {count} config_groups; checkpoints with one scheme can be read")
    (group,) = groups.values()
    _expect("quantization_status", config.get("quantization_status") or "compressed", "compressed")
    _expect("kv_cache_scheme", config.get("kv_cache_scheme") or None, None)
    for key, says_nothing in (("sparsity_config", {"format": "dense"}), ("transform_config", {"config_groups": {}})):
        found = config.get(key) or None
        _expect(key, None if found == says_nothing else found, None)
    _expect("output_activations", group.get("output_activations"), None)
    layout = group.get("format") or config.get("format")
    _expect("format", layout, "pack-quantized", "int-quantized")
    scheme = _weights_scheme({**_DEFAULTS, **(group.get("weights") or {})})
    inputs = group.get("input_activations")
    if layout == "pack-quantized":
        _expect("input_activations", inputs, None)
        return scheme
    for key, expected in _TOKEN_ACTIVATIONS.items():
        found = ({**_DEFAULTS, **inputs} if isinstance(inputs, Mapping) else {}).get(key)
        _expect(f"input_activations.{key} of int-quantized", found, expected)
    if (scheme.bits, scheme.group_size, scheme.symmetric) != (8, PER_CHANNEL, True):
        raise CheckpointError(
            "quantization_config has int-quantized weights that are not 8 bits, symmetric and of strategy channel; "
            "those alone can be read"
        )
    return Scheme(8, PER_CHANNEL, True, "int8")


def _weights_scheme(weights: Mapping[str, Any]) -> Scheme:
    _expect("weights.num_bits", weights.get("num_bits"), *READ_BITS)
    _expect("weights.type", weights["type"], "int")
    _expect("weights.symmetric", weights["symmetric"], True, False)
    _expect("weights.dynamic", weights["dynamic"], False)
    _expect("weights.actorder", weights.get("actorder"), None, False, "weight", "static")  # "group" permutes columns
    group_size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if group_size not in (None, PER_CHANNEL) else "channel")
    _expect("weights.strategy", strategy, "group", "channel")
    if strategy == "channel":
        return Scheme(weights["num_bits"], PER_CHANNEL, weights["symmetric"])
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise CheckpointError(f"quantization_config has weights.group_size {group_size!r}; expected a positive number")
    return Scheme(weights["num_bits"], group_size, weights["symmetric"])


def _expect(key: str, found: Any, *allowed: Any) -> None:
    if not any(found == value and isinstance(found, bool) == isinstance(value, bool) for value in allowed):
        wanted = listed([repr(value) for value in allowed if value is not None] or ["none"])
        raise CheckpointError(f"quantization_config has {key} {found!r}; only {wanted} can be read")
