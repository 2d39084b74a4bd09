"""Turn the tensors of a quantised checkpoint into its weights, whichever way they are stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ....errors import MergeError
from ...dtypes import DTYPE_BY_NAME, DType
from ...tensor import TensorInfo
from .bitsandbytes import read_bitsandbytes
from .evidence import SETTINGS_KEYS, why_quantised
from .four_bit_floats import read_four_bit_floats
from .fp8 import read_fp8
from .gptq import read_gptq
from .hqq import read_hqq
from .integers import read_integers
from .mlx import read_mlx
from .pool import Pool
from .torchao import read_torchao

__all__ = ["Quantisation", "declared_dtype", "dequantise"]

_READERS = (
    *(read_bitsandbytes, read_four_bit_floats, read_gptq, read_mlx, read_torchao, read_hqq),
    *(read_integers, read_fp8),
)

_KNOWN = frozenset(
    [
        "fp8",
        "fbgemm_fp8",
        "finegrained_fp8",
        "compressed-tensors",
        "mxfp4",
        "bitsandbytes",
        "gptq",
        "awq",
        "modelopt",
        "modelopt_fp4",
        "torchao",
        "hqq",
        "auto-round",
        "auto_round",
        "intel/auto-round",
    ]
)

# Numbers that serve quantised activations and caches, or tell programs how to lay out the weights.
_OF_ACTIVATIONS = re.compile(
    r".*[._](input_scale|input_global_scale|input_zero_point|activation_scale|act_scale|output_scale|[kqv]_scale|"
    r"kv_scale|weight_format|input_scale_inv|prob_scale)"
)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the weights of a checkpoint are quantised.

    Args:
        evidence: How it was recognised, as in "fp8 (config.json quantization_config.quant_method)".
        schemes: The ways of storing values that its tensors use, as in "float8_e4m3fn per 128x128".
        unreadable: Why its weights cannot be read; None if they are dequantised while they are read.
        left_out: Tensors that unquantised weights have no use for, and why, by name.
        rescaled: Whether quantising also changed the scales of neighbouring tensors (AWQ), so that they are not to be
            compared with those of the model it was made from.
    """

    evidence: str
    schemes: tuple[str, ...] = ()
    unreadable: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    rescaled: bool = False


def dequantise(
    where: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, TensorInfo], Quantisation | None]:
    """Return the weights of a checkpoint by the names of the unquantised model, dequantised when they are read.

    Args:
        where: The checkpoint, for messages.
        config: config.json.
        tensors: The tensors of its files.
        metadata: The `__metadata__` of the files' headers.

    Returns:
        The tensors, those of the files if they are not quantised or cannot be read; and how they are quantised.
    """
    evidence = why_quantised(config, tensors)
    if evidence is None:
        return dict(tensors), None
    settings = _settings(config)
    method = settings.get("quant_method")
    if isinstance(method, str) and method not in _KNOWN:
        return dict(tensors), Quantisation(
            evidence,
            unreadable=f"the method {method!r} cannot be read; fp8, compressed-tensors, mxfp4, "
            "bitsandbytes, gptq, awq, modelopt, torchao, hqq and MLX can",
        )
    pool = Pool(where, settings, tensors, declared_dtype(config) or DTYPE_BY_NAME["bfloat16"], metadata)
    try:
        for read in _READERS:
            read(pool)
    except MergeError as error:
        # a checkpoint that cannot be merged can still be looked at
        return dict(tensors), Quantisation(evidence, unreadable=str(error))
    for name in tensors:
        if _OF_ACTIVATIONS.fullmatch(name):
            pool.drop(name, "a scale of activations, or a layout, which unquantised weights have no use for")
    found = pool.result()
    if not pool.schemes:
        return dict(tensors), Quantisation(evidence, unreadable="no tensor is stored in a way that is known")
    if left := why_quantised({}, found):
        return dict(tensors), Quantisation(evidence, unreadable=f"{left}, and is not understood")
    rescaled = any(scheme.startswith("awq") for scheme in pool.schemes)
    return found, Quantisation(evidence, tuple(sorted(pool.schemes)), None, pool.dropped, rescaled)


def declared_dtype(config: Mapping[str, Any]) -> DType | None:
    """Return the dtype of the config, in which the model was trained or is meant to be run; None if it has none."""
    parts = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            found = DTYPE_BY_NAME.get(str(part.get(key)))
            if found is not None and found.kind == "float":
                return found
    return None


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the quantisation, at the top of the config or in one of its parts."""
    parts = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    for part in parts:
        for key in SETTINGS_KEYS:
            if isinstance(part.get(key), dict) and part[key]:
                return dict(part[key])
    return {}
