"""Which type each tensor of a GGUF file has, by the type of the file: as `llama-quantize` chooses without importance matrix.

A file of the type Q4_K_M, say, holds Q4_K for the most part, and more bits where rounding does the most harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .header import TYPE_BY_NAME

__all__ = ["FILE_TYPES", "Sizes", "tensor_type"]

FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "BF16": 32,
}
"""Types of files that can be written, with llama.cpp's numbers for them (`general.file_type`)."""

_SMALL = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""The type with blocks of 32 values that replaces one of 256, where rows are not a multiple of 256."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model is like, as far as types depend on it.

    Args:
        architecture: Its family, as llama.cpp names it.
        layers: Number of layers.
        experts: Number of experts in a layer; 0 in dense models.
        heads: Heads of queries.
        key_heads: Heads of keys and values.
        tied: Whether the embedding is the head too.
    """

    architecture: str
    layers: int
    experts: int
    heads: int
    key_heads: int
    tied: bool

    @property
    def shared(self) -> int:
        """How many heads of queries share one of keys."""
        return self.heads // self.key_heads if self.key_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether it is what llama.cpp calls a model of 70 B: its values are small beside its queries."""
        return self.layers == 80 and (
            self.architecture == "qwen2" or (self.architecture == "llama" and self.heads != self.key_heads)
        )


def tensor_type(file_type: str, module: str, layer: int, columns: int, sizes: Sizes) -> str:
    """Return the type of a weight matrix.

    Args:
        file_type: One of `FILE_TYPES`.
        module: Its name in the file without layer and suffix, such as "attn_v".
        layer: Its layer; 0 outside the layers.
        columns: Values of a row.
        sizes: The model's.
    """
    if file_type in ("F32", "F16", "BF16"):
        return file_type
    main = file_type.removesuffix("_S").removesuffix("_M").removesuffix("_L")
    if module == "output" or (module == "token_embd" and sizes.tied):
        chosen = "Q8_0" if main == "Q8_0" else "Q6_K"
    elif sizes.experts == 8 and module in ("attn_v", "attn_qkv", "attn_k"):
        chosen = "Q8_0"
    elif module in ("attn_v", "attn_qkv"):
        chosen = _VALUES.get(file_type, _main)(main, layer, sizes)
        if sizes.is_70b and chosen in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
    elif module.startswith("ffn_down"):
        chosen = _DOWN.get(file_type, _main)(main, layer, sizes)
    elif module == "attn_output":
        chosen = (_OUTPUT_OF_EIGHT if sizes.experts == 8 else _OUTPUT).get(file_type, main)
    else:
        chosen = main
    return _fitting(chosen, columns)


def _fitting(kind: str, columns: int) -> str:
    """Return the type, or one for rows of another length."""
    if columns % TYPE_BY_NAME[kind].values:
        kind = _SMALL.get(kind, kind)
    return "F16" if columns % TYPE_BY_NAME[kind].values else kind


Rule = Callable[[str, int, Sizes], str]


def _main(main: str, layer: int, sizes: Sizes) -> str:
    return main


def _always(kind: str) -> Rule:
    return lambda main, layer, sizes: kind


def _more_bits(main: str, layer: int, sizes: Sizes) -> str:
    """Q6_K in the first and last eighth of the layers, and in each third layer between."""
    eighth, late = sizes.layers // 8, 7 * sizes.layers // 8
    return "Q6_K" if layer < eighth or layer >= late or (layer - eighth) % 3 == 2 else main


_VALUES: dict[str, Rule] = {
    "Q2_K": lambda main, layer, sizes: "Q4_K" if sizes.shared >= 4 else "Q3_K",
    "Q3_K_M": lambda main, layer, sizes: "Q5_K" if layer < 2 else "Q4_K",
    "Q3_K_L": _always("Q5_K"),
    "Q4_K_S": lambda main, layer, sizes: "Q5_K" if layer < 4 else main,
    "Q4_K_M": _more_bits,
    "Q5_K_M": _more_bits,
}
_DOWN: dict[str, Rule] = {
    "Q2_K": _always("Q3_K"),
    "Q3_K_M": lambda main, layer, sizes: "Q5_K" if layer < sizes.layers // 16 else "Q4_K",
    "Q3_K_L": _always("Q5_K"),
    "Q4_K_S": lambda main, layer, sizes: "Q5_K" if layer < sizes.layers // 8 else main,
    "Q4_K_M": _more_bits,
    "Q5_K_M": _more_bits,
}
_OUTPUT = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
_OUTPUT_OF_EIGHT = dict.fromkeys(("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"), "Q5_K")
