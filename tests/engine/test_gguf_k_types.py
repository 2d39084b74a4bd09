"""`gguf` with K types, and with the types of another file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from merganser.checkpoint.formats.gguf.k_quants import K_TYPES, quantise_k
from merganser.checkpoint.formats.gguf.mixes import FILE_TYPES
from merganser.engine.merge import merge
from merganser.errors import MergeError
from merganser.recipe.fields.gguf import GGUF_TYPES, SAME
from merganser.record import verify
from tests.checkpoint.gguf.making import random_blocks, written
from tests.engine.test_gguf_output import NUMBERS, converted, merged, recipe_of, write_gguf
from tests.making import llama, llama_config, make_recipe


def types_of(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def test_k_types_are_mixed_as_llama_quantize_does_and_kept_by_the_next_merge(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "Q4_K_M", hidden=256)
    out = merge(recipe, tmp_path / "out").out
    file = out / "model-Q4_K_M.gguf"
    found = types_of(file)
    assert {name: kind for name, kind in found.items() if kind not in ("F32", "Q4_K")} == {
        "output.weight": "Q6_K",
        "blk.1.attn_v.weight": "Q6_K",
        # rows of 24
        "blk.0.ffn_down.weight": "F16",
        "blk.1.ffn_down.weight": "F16",
    }
    assert sum(kind == "Q4_K" for kind in found.values()) == 12
    values = converted(merged(recipe, tmp_path / "wide"))
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.tensor_type.name in K_TYPES:
            expected = quantise_k(values[tensor.name].numpy(), tensor.tensor_type.name)
            assert np.array_equal(np.asarray(tensor.data).ravel(), expected), tensor.name
    assert verify(out).ok
    # from these files, with a layer more
    slices = [{"sources": [{"model": str(file), "layer_range": each}]} for each in ([0, 2], [0, 1])]
    again = merge({"merge_method": "passthrough", "slices": slices, "gguf": SAME}, tmp_path / "again")
    assert again.record["gguf"]["type"] == SAME
    reader = gguf.GGUFReader(again.out / "model-Q4_K_M.gguf")
    assert reader.fields["general.file_type"].contents() == FILE_TYPES["Q4_K_M"]
    kept = types_of(again.out / "model-Q4_K_M.gguf")
    assert {name: kept[name] for name in found} == found
    assert kept["blk.2.ffn_up.weight"] == "Q4_K"


def test_types_that_cannot_be_written_are_not_kept(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    file = write_gguf(folder, llama(0, hidden=256), llama_config(hidden=256))
    stored = {t.name: (np.array(t.data), t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    stored["blk.1.ffn_up.weight"] = (random_blocks(T.IQ4_XS, 24, 1), T.IQ4_XS)
    written(file, "llama", stored, NUMBERS)
    recipe = make_recipe("linear", [file], None, {"weight": 1}, gguf=SAME, quantised="allow")
    with pytest.raises(MergeError, match=r"blk\.1\.ffn_up\.weight .* is IQ4_XS, which cannot be written; name a type"):
        merge(recipe, tmp_path / "out")


def test_every_type_of_a_recipe_is_a_type_of_files() -> None:
    assert {*GGUF_TYPES} == {*FILE_TYPES, SAME}
