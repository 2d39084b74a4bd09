"""Types of tensors in files of each type: as llama-quantize chose them."""

from __future__ import annotations

import pytest

from merganser.checkpoint.formats.gguf.mixes import FILE_TYPES, Sizes, tensor_type

DENSE = Sizes("llama", 16, 0, 8, 2, tied=False)
MODULES = ("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def types(kind: str, sizes: Sizes, columns: int = 256) -> dict[str, str]:
    """The types of each module in all layers: one, or one letter per layer."""
    found = {}
    for module in MODULES:
        own = [tensor_type(kind, module, layer, columns, sizes) for layer in range(sizes.layers)]
        found[module] = own[0] if len(set(own)) == 1 else "".join(each[1] for each in own)
    return found


MIXES = {
    "Q2_K": ("Q2_K", "Q4_K", "Q3_K", "Q3_K"),
    "Q3_K_S": ("Q3_K", "Q3_K", "Q3_K", "Q3_K"),
    "Q3_K_M": ("Q3_K", "5544444444444444", "Q4_K", "5444444444444444"),
    "Q3_K_L": ("Q3_K", "Q5_K", "Q5_K", "Q5_K"),
    "Q4_K_S": ("Q4_K", "5555444444444444", "Q4_K", "5544444444444444"),
    "Q4_K_M": ("Q4_K", "6644644644644666", "Q4_K", "6644644644644666"),
    "Q5_K_S": ("Q5_K", "Q5_K", "Q5_K", "Q5_K"),
    "Q5_K_M": ("Q5_K", "6655655655655666", "Q5_K", "6655655655655666"),
    "Q6_K": ("Q6_K", "Q6_K", "Q6_K", "Q6_K"),
    "Q4_0": ("Q4_0", "Q4_0", "Q4_0", "Q4_0"),
    "Q8_0": ("Q8_0", "Q8_0", "Q8_0", "Q8_0"),
    "BF16": ("BF16", "BF16", "BF16", "BF16"),
}


@pytest.mark.parametrize("kind", MIXES)
def test_a_dense_model(kind: str) -> None:
    main, values, output, down = MIXES[kind]
    expected = dict.fromkeys(MODULES, main) | {"attn_v": values, "attn_output": output, "ffn_down": down}
    expected["output"] = main if kind in ("Q8_0", "BF16") else "Q6_K"
    assert types(kind, DENSE) == expected


def test_an_embedding_that_is_the_head() -> None:
    tied = Sizes("llama", 16, 0, 8, 8, tied=True)
    assert tensor_type("Q4_0", "token_embd", 0, 256, tied) == "Q6_K"
    assert tensor_type("Q4_0", "token_embd", 0, 576, tied) == "Q8_0"
    assert tensor_type("Q8_0", "token_embd", 0, 256, tied) == "Q8_0"
    # and every head of queries has its own keys
    assert tensor_type("Q2_K", "attn_v", 0, 256, tied) == "Q3_K"


def test_eight_experts() -> None:
    eight = Sizes("llama", 4, 8, 8, 2, tied=False)
    for module in ("attn_k", "attn_v"):
        assert {tensor_type(kind, module, 0, 256, eight) for kind in ("Q4_0", "Q2_K", "Q6_K")} == {"Q8_0"}
        assert tensor_type("Q6_K", module, 0, 256, Sizes("llama", 4, 4, 8, 2, tied=False)) == "Q6_K"
    found = {kind: tensor_type(kind, "attn_output", 0, 256, eight) for kind in ("Q2_K", "Q3_K_L", "Q4_K_M", "Q4_0")}
    assert found == {"Q2_K": "Q5_K", "Q3_K_L": "Q3_K", "Q4_K_M": "Q5_K", "Q4_0": "Q4_0"}
    assert [tensor_type("Q4_K_M", "ffn_down_exps", layer, 256, eight) for layer in range(4)] == [
        *("Q4_K", "Q4_K", "Q6_K", "Q6_K")
    ]


@pytest.mark.parametrize(
    ("architecture", "heads", "key_heads", "layers", "expected"),
    [
        ("llama", 64, 8, 80, "Q5_K"),
        ("llama", 64, 64, 80, "Q4_K"),
        ("qwen2", 64, 64, 80, "Q5_K"),
        ("qwen3", 64, 8, 80, "Q4_K"),
        ("llama", 64, 8, 81, "Q4_K"),
    ],
)
def test_models_of_70_b(architecture: str, heads: int, key_heads: int, layers: int, expected: str) -> None:
    assert tensor_type("Q4_K_M", "attn_v", 10, 256, Sizes(architecture, layers, 0, heads, key_heads, False)) == expected


def test_rows_of_other_lengths() -> None:
    found = {kind: tensor_type(kind, "attn_q", 0, 576, DENSE) for kind in FILE_TYPES if "K" in kind}
    assert found == {
        **dict.fromkeys(("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L"), "Q4_0"),
        **dict.fromkeys(("Q4_K_S", "Q4_K_M"), "Q5_0"),
        **dict.fromkeys(("Q5_K_S", "Q5_K_M"), "Q5_1"),
        "Q6_K": "Q8_0",
    }
    assert {tensor_type(kind, "attn_q", 0, 24, DENSE) for kind in FILE_TYPES if kind not in ("F32", "BF16")} == {"F16"}
