"""The key `gguf` of a recipe: the output is a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..document.place import Entry, Place

__all__ = ["GGUF_KEYS", "GGUF_TYPES", "SAME", "Gguf", "read_gguf_key"]

GGUF_KEYS = ("type", "metadata")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAME = "same"
"""Instead of a type: every tensor has the type that it has in the file whose metadata are copied."""

GGUF_TYPES = (
    *_DTYPES,
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", SAME),
)
"""Types of files that can be written, as llama-quantize names them; the most precise first."""

_OTHER_TYPES = ("Q1_0", "Q2_0", "Q2_K_S", "IQ1_", "IQ2_", "IQ3_", "IQ4_", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4")
_OTHER_NAMES = {"MXFP4": "MXFP4_MOE"}
"""Names of files of llama-quantize for types of tensors."""

_SHORT = {"q3_k": "Q3_K_M", "q4_k": "Q4_K_M", "q5_k": "Q5_K_M", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True, slots=True)
class Gguf:
    """How the output is written as GGUF.

    Args:
        type: The type of the file, as llama.cpp names it, or `SAME`.
        metadata: File whose metadata are copied; None for that of the model that lends config and tokenizer.
        place: Where the recipe says it.
    """

    type: str
    metadata: str | None
    place: Place

    @property
    def dtype(self) -> str | None:
        """The name in torch of a type that does not quantise; None for the others."""
        return _DTYPES.get(self.type)


def read_gguf_key(entry: Entry, fields: Mapping[str, Entry]) -> Gguf:
    """Read the key: a type, or a mapping of `type` and `metadata`.

    Args:
        entry: Its value.
        fields: All keys of the recipe.

    Raises:
        RecipeError: A key or value is not allowed, the type can be made by llama.cpp alone, or another key also says how
            the output is stored.
    """
    for key in ("quantize", "out_dtype"):
        if key in fields:
            raise fields[key].error("'gguf' says how the output is stored; leave this key out")
    if not isinstance(entry.value, dict):
        return Gguf(_type(entry), None, entry.place)
    fields = entry.mapping(GGUF_KEYS, required=["type"])
    metadata = fields["metadata"].text() if "metadata" in fields else None
    return Gguf(_type(fields["type"]), metadata, entry.place)


def _type(entry: Entry) -> str:
    name = entry.value.upper() if isinstance(entry.value, str) else ""
    if name.startswith(_OTHER_TYPES):
        file = _OTHER_NAMES.get(name, name)
        raise entry.error(
            f"{name} cannot be written, only {', '.join(GGUF_TYPES)}; write 'gguf: F32', and quantise that file with "
            f"llama.cpp: llama-quantize OUT/model-F32.gguf OUT-{file}.gguf {file}"
        )
    return entry.choice(GGUF_TYPES, {**{each.lower(): each for each in GGUF_TYPES}, **_SHORT})
