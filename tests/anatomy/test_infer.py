"""Structure inferred from the real names of each architecture."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from merganser.anatomy import Anatomy, infer_anatomy
from tests.anatomy.architectures import ARCHITECTURES, Real, published, real

EXPECTED = {
    block.split(" | ", 1)[0]: block
    for block in Path(__file__).with_name("roles.txt").read_text().rstrip().split("\n== ")[1:]
}
PUBLISHED = [title.removesuffix(" published") for title in EXPECTED if title.endswith("published")]


def described(title: str, anatomy: Anatomy) -> str:
    """Write an anatomy in the format of roles.txt."""
    stacks = ", ".join(f"{prefix} {size}" for prefix, size in anatomy.stacks.items())
    header = f"{title} | stacks {stacks} | main {anatomy.main} | embedding {anatomy.embedding} | head {anatomy.head}"
    groups: dict[str, set[str]] = {}
    for name, part in anatomy.parts.items():
        if part.layer is not None:
            assert name.startswith(f"{part.stack}.{part.layer}.")
            name = name.replace(f"{part.stack}.{part.layer}.", f"{part.stack}.*.", 1)
        if part.expert is not None:
            assert f"experts.{part.expert}." in name
            name = name.replace(f"experts.{part.expert}.", "experts.*.")
        groups.setdefault(f"{part.role} {part.position}", set()).add(re.sub(r"\.(weight|bias)$", "", name))
    return "\n".join([header, *(f"{group} {' '.join(sorted(groups[group]))}" for group in sorted(groups))])


def check(title: str, found: Real) -> None:
    anatomy = infer_anatomy(found.shapes, found.config)
    assert list(anatomy.parts) == list(found.shapes)
    assert described(title, anatomy) == EXPECTED[title]
    assert anatomy.vocab_size == 96
    assert "other" not in {part.role for part in anatomy.parts.values()}
    for prefix, size in anatomy.stacks.items():
        layers = [part.layer for part in anatomy.parts.values() if part.stack == prefix]
        assert set(layers) == set(range(size))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_in_memory(name):
    check(name, real(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name, tmp_path):
    found = published(name, tmp_path)
    assert set(found.shapes) != set(real(name).shapes)
    check(f"{name} published", found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ties_are_those_of_transformers(name):
    found = real(name)
    assert dict(infer_anatomy(found.shapes, found.config).tied) == found.tied


def test_some_architectures_are_tied_and_some_are_not():
    assert not real("llama").tied
    assert real("gemma").tied == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize(("name", "layout"), [("gemma3", "published"), ("gpt_neox", "published"), ("gpt2", "memory")])
def test_alias_is_the_name_of_the_head_in_untied_checkpoints(name, layout, tmp_path, monkeypatch):
    kind, settings, auto = ARCHITECTURES[name]
    monkeypatch.setitem(ARCHITECTURES, name, (kind, {**settings, "tie_word_embeddings": False}, auto))
    real.cache_clear()
    found = published(name, tmp_path) if layout == "published" else real(name)
    real.cache_clear()
    untied = infer_anatomy(found.shapes, found.config)
    assert untied.head is not None
    assert untied.tied == []
    shapes = {key: shape for key, shape in found.shapes.items() if key != untied.head}
    tied = infer_anatomy(shapes, {**found.config, "tie_word_embeddings": True})
    assert (tied.head, tied.tied) == (None, [(untied.head, untied.embedding)])


def test_a_model_without_a_language_head_has_no_tie():
    found = real("bert")
    shapes = {name: shape for name, shape in found.shapes.items() if not name.startswith("cls.")}
    config = {**found.config, "architectures": ["BertForSequenceClassification"]}
    assert infer_anatomy(shapes, config).tied == []


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "gemma"}, True),
        ({"model_type": "unheard_of"}, False),
        ({"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"]}, True),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, False),
        ({"model_type": "gemma", "architectures": ["GemmaModel"]}, False),
    ],
)
def test_a_file_without_a_head_is_tied_when_the_config_says_or_implies_so(config, tied):
    anatomy = infer_anatomy({"model.embed_tokens.weight": (96, 8)}, config)
    assert anatomy.tied == ([("lm_head.weight", "model.embed_tokens.weight")] if tied else [])


def test_the_shared_embedding_is_the_source_even_when_its_copies_are_in_the_file():
    shapes = dict.fromkeys(("decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "shared.weight"), (96, 8))
    anatomy = infer_anatomy(shapes, {"model_type": "t5"})
    assert anatomy.embedding == "shared.weight"
    assert anatomy.tied == [("lm_head.weight", "shared.weight")]


def test_depth_and_names_of_layers():
    anatomy = infer_anatomy(real("llama").shapes, real("llama").config)
    assert anatomy.n_layers == 4
    name = "model.layers.2.mlp.up_proj.weight"
    assert anatomy.depth(name) == 2 / 3
    assert anatomy.depth("model.layers.0.mlp.up_proj.weight") == 0
    assert anatomy.depth("model.layers.3.mlp.up_proj.weight") == 1
    assert anatomy.depth("model.norm.weight") is None
    assert anatomy.rename_layer(name, 11) == "model.layers.11.mlp.up_proj.weight"
    assert anatomy.rename_layer("model.norm.weight", 11) == "model.norm.weight"


def test_depth_in_encoder_and_decoder():
    anatomy = infer_anatomy(real("whisper").shapes, real("whisper").config)
    assert (anatomy.main, anatomy.n_layers) == (None, 0)
    assert anatomy.depth("model.encoder.layers.1.fc1.weight") == 1
    assert anatomy.depth("model.decoder.layers.1.fc1.weight") == 0.5


def test_depth_of_a_tower_beside_the_main_stack_is_unknown():
    anatomy = infer_anatomy(real("gemma3").shapes, real("gemma3").config)
    name = "model.vision_tower.encoder.layers.1.mlp.fc1.weight"
    assert anatomy.depth(name) is None
    assert anatomy.parts[name].layer == 1
    assert anatomy.parts[name].position == "before"


def test_a_single_layer_is_the_last():
    anatomy = infer_anatomy({"model.layers.0.mlp.up_proj.weight": (4, 4)}, {"num_hidden_layers": 1})
    assert anatomy.n_layers == 1
    assert anatomy.depth("model.layers.0.mlp.up_proj.weight") == 1


def layers(prefix, count, *suffixes):
    return {f"{prefix}.{index}.{suffix}": (8, 8) for index in range(count) for suffix in suffixes}


def test_gpt2_as_first_published_has_no_prefix():
    shapes = {"wte.weight": (96, 8), "wpe.weight": (64, 8), "ln_f.weight": (8,)}
    shapes |= layers("h", 3, "attn.bias", "attn.c_attn.weight", "ln_1.weight", "mlp.c_fc.weight")
    anatomy = infer_anatomy(shapes, {"model_type": "gpt2", "n_layer": 3})
    assert (anatomy.main, anatomy.n_layers, anatomy.embedding) == ("h", 3, "wte.weight")
    assert anatomy.tied == [("lm_head.weight", "wte.weight")]
    assert anatomy.parts["h.0.attn.bias"].role == "attention"
    assert anatomy.parts["h.2.ln_1.weight"].layer == 2


def test_without_a_config():
    shapes = {"tok_embeddings.weight": (96, 8), "output.weight": (96, 8), "norm.weight": (8,), "rope.freqs": (4,)}
    shapes |= layers("layers", 2, "attention.wo.weight", "feed_forward.w1.weight", "ffn_norm.weight")
    anatomy = infer_anatomy(shapes, {})
    assert (anatomy.main, anatomy.embedding, anatomy.head) == ("layers", "tok_embeddings.weight", "output.weight")
    assert [part.role for part in anatomy.parts.values()] == [
        *("embedding", "head", "norm", "position"),
        *("attention", "mlp", "norm") * 2,
    ]


def test_an_unknown_prefix_is_a_stack_when_its_layers_look_alike():
    shapes = layers("net.cells", 5, "mixing.weight", "gain")
    assert infer_anatomy(shapes, {}).stacks == {"net.cells": 5}
    assert infer_anatomy(layers("classifier", 2, "weight", "bias"), {}).stacks == {}
    assert infer_anatomy(layers("classifier", 2, "weight", "bias"), {"n_layer": 2}).stacks == {"classifier": 2}


def test_experts_are_not_layers():
    shapes = layers("model.layers.0.mlp.experts", 8, "up_proj.weight") | layers("mlp.experts", 8, "up_proj.weight")
    anatomy = infer_anatomy(shapes, {"num_hidden_layers": 8})
    assert anatomy.stacks == {"model.layers": 1}
    assert anatomy.parts["model.layers.0.mlp.experts.5.up_proj.weight"].expert == 5
    assert anatomy.parts["mlp.experts.5.up_proj.weight"].layer is None


def test_a_dense_gate_is_no_router():
    anatomy = infer_anatomy(layers("model.layers", 2, "mlp.gate.weight"), {})
    assert {part.role for part in anatomy.parts.values()} == {"mlp"}


def test_layers_without_tensors_need_the_count_of_the_config():
    shapes = {f"model.layers.{index}.mlp.up_proj.weight": (8, 8) for index in (0, 1, 3)}
    assert infer_anatomy(shapes, {"num_hidden_layers": 5}).stacks == {"model.layers": 5}
    assert infer_anatomy(shapes, {}).stacks == {}


def test_equal_candidates_have_no_main_stack():
    shapes = layers("down_blocks", 3, "conv1.weight") | layers("up_blocks", 3, "conv1.weight")
    assert infer_anatomy(shapes, {}).main is None
    shapes = layers("encoder.layers", 2, "attn.weight") | layers("decoder.layers", 9, "attn.weight")
    assert infer_anatomy(shapes, {"encoder_layers": 2, "decoder_layers": 9}).main is None
    shapes = layers("double_blocks", 2, "attn.weight") | layers("single_blocks", 4, "attn.weight")
    anatomy = infer_anatomy(shapes, {"num_layers": 2})
    assert (anatomy.main, list(anatomy.stacks)) == ("double_blocks", ["double_blocks", "single_blocks"])


def test_the_tower_with_as_many_layers_is_not_the_main_stack():
    shapes = {"model.embed_tokens.weight": (96, 8), "visual.patch_embed.proj.weight": (8, 3, 2, 2)}
    shapes |= layers("visual.blocks", 2, "attn.qkv.weight") | layers("model.layers", 2, "self_attn.q_proj.weight")
    anatomy = infer_anatomy(shapes, {"num_hidden_layers": 2, "vision_config": {"depth": 2}})
    assert list(anatomy.stacks) == ["model.layers", "visual.blocks"]
    assert anatomy.main == "model.layers"
    assert anatomy.parts["visual.blocks.1.attn.qkv.weight"].position == "before"


def test_prediction_layers_behind_the_last_are_not_counted():
    shapes = layers("model.layers", 4, "mlp.up_proj.weight") | {"model.layers.3.shared_head.head.weight": (96, 8)}
    anatomy = infer_anatomy(shapes, {"num_hidden_layers": 3, "num_nextn_predict_layers": 1})
    assert (anatomy.n_layers, anatomy.stacks) == (3, {"model.layers": 3})
    part = anatomy.parts["model.layers.3.shared_head.head.weight"]
    assert (part.stack, part.layer, part.position, part.role) == ("model.layers", None, "after", "head")
    assert anatomy.depth("model.layers.3.mlp.up_proj.weight") is None


def test_parts_cannot_be_changed():
    part = infer_anatomy({"wte.weight": (96, 8)}, {}).parts["wte.weight"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.role = "head"


def test_importing_loads_no_torch():
    code = "import sys, merganser.anatomy; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
