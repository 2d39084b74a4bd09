"""What every input lacks alike, and configs that describe other tensors, are refused or said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from merganser import merge, plan
from merganser.anatomy import infer_anatomy
from merganser.anatomy.gaps import _IN_EVERY_LAYER, doubts
from merganser.engine.alignment.complete import check_complete
from merganser.errors import CheckpointError
from tests.anatomy.architectures import ARCHITECTURES, published, real
from tests.calibration.families import save as save_mixture
from tests.engine.alignment.small_models import save
from tests.making import Tensors, llama, llama_config, make_recipe, write_model


def recipe_of(root: Path, config: dict[str, Any], *lacking: str, layers: int = 4) -> dict[str, Any]:
    """A recipe of two models that lack the same tensors."""

    def complete(seed: int) -> Tensors:
        return {
            name: tensor for name, tensor in llama(seed, layers).items() if not re.fullmatch("|".join(lacking), name)
        }

    paths = [write_model(root / f"m{seed}", complete(seed), config) for seed in range(2)]
    return make_recipe("linear", paths, parameters={"weight": 0.5})


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"model\.layers\.2\.self_attn\.q_proj\.weight", "layer 2 of model.layers has no self_attn.q_proj.weight"),
        (r"model\.layers\.2\..*", "layer 2 of model.layers has no tensors"),
        (r".*input_layernorm\.weight", "layer 0 of model.layers has no input_layernorm.weight"),
        (r"model\.layers\.3\..*", "config.json says 4 layers, the tensors have 3"),
        (r"model\.embed_tokens\.weight", "there is no embedding of tokens"),
        (r"model\.norm\.weight", "there is no norm after the layers"),
        (r"lm_head\.weight", "there is no output head, and config.json does not tie it to the embedding"),
    ],
)
def test_what_all_models_lack_is_refused_by_name(tmp_path: Path, pattern: str, said: str) -> None:
    recipe = recipe_of(tmp_path, llama_config(4), pattern)
    with pytest.raises(CheckpointError) as caught:
        merge(recipe, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'm0'}: {said}")
    assert message.count(said) == 1
    assert "LlamaForCausalLM needs tensors that none of the models has" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_hidden_layers": 3}, "config.json says 3 layers, the tensors have 4"),
        ({"num_hidden_layers": 5}, "config.json says 5 layers, the tensors have 4"),
        (
            {"num_hidden_layers": -1},
            "config.json says num_hidden_layers is -1, which must be a whole number of at least",
        ),
        ({"num_hidden_layers": "two"}, "config.json says num_hidden_layers is 'two', which must be a whole number of"),
        ({"num_hidden_layers": float("nan")}, "config.json says num_hidden_layers is nan, which must be"),
        (
            {"num_attention_heads": 0},
            "config.json says num_attention_heads is 0, which must be a whole number of at le",
        ),
        ({"num_attention_heads": 3}, "config.json says 3 attention heads of width 5, self_attn.q_proj.weight has 16"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "config.json says num_attention_heads is 4, which num_ke",
        ),
        ({"num_key_value_heads": 2}, "config.json says 2 key-value heads of width 8, self_attn.k_proj.weight has 8 ro"),
        ({"hidden_size": 32}, "config.json says a hidden size of 32, the embedding has 16 columns"),
        ({"intermediate_size": 25}, "config.json says an intermediate size of 25, mlp.up_proj.weight has 24 rows"),
        ({"vocab_size": 31}, "config.json says a vocabulary of 31, the embedding has 32 rows"),
    ],
)
def test_a_config_of_other_sizes_than_the_tensors_is_refused(tmp_path: Path, settings: dict, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{tmp_path}/m0: {said}')}"):
        plan(recipe_of(tmp_path, llama_config(4) | settings))


@pytest.mark.parametrize(
    ("config", "lacking", "said"),
    [
        ({"num_hidden_layers": 10**9}, "", "config.json says 1000000000 layers, the tensors have 4"),
        (
            {"architectures": ["Unheard"]},
            r"model\.layers\.2\..*up_proj.*",
            "layer 2 of model.layers has no mlp.up_proj",
        ),
        (
            {"auto_map": {"AutoModel": "m.M"}, "vocab_size": 9},
            "",
            "config.json says a vocabulary of 9, the embedding has",
        ),
    ],
)
def test_where_no_class_is_known_doubts_are_said(tmp_path: Path, config: dict, lacking: str, said: str) -> None:
    (warning, *_) = plan(recipe_of(tmp_path, llama_config(4) | config, lacking)).warnings
    assert warning.startswith(f"{tmp_path / 'm0'}: {said}")
    assert warning.endswith("; whether the output loads was not checked")


def test_without_transformers_doubts_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    (warning,) = plan(recipe_of(tmp_path, llama_config(4), r"lm_head\.weight")).warnings
    assert warning.endswith("does not tie it to the embedding; whether the output loads was not checked")


def test_without_a_config_the_structure_alone_is_compared(tmp_path: Path) -> None:
    warnings = plan(recipe_of(tmp_path, {}, r"model\.layers\.1\.mlp\.up_proj\.weight")).warnings
    assert any(each.startswith(f"{tmp_path / 'm0'}: layer 1 of model.layers has no mlp.up_proj") for each in warnings)


@pytest.mark.parametrize("said", [8, None, "four"])
def test_other_numbers_of_experts_than_the_config_says(tmp_path: Path, said: Any) -> None:
    folder = save_mixture(tmp_path / "mixtral", "mixtral")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    assert check_complete("m", config, shapes) == []
    assert config.pop("num_local_experts") == 4
    config |= {} if said is None else {"num_local_experts": said}
    wanted = f"m: config.json says {said if said == 8 else 'no number of'} experts, and layers have 4"
    with pytest.raises(CheckpointError, match=re.escape(wanted)) as caught:
        check_complete("m", config, shapes)
    if said != "four":
        assert "experts.gate_up_proj holds 4 experts, the config describes 8" in str(caught.value)


def test_an_expert_that_is_nowhere_is_doubted() -> None:
    model = real("qwen2_moe")
    names = [f"model.layers.2.mlp.experts.{i}.{part}_proj.weight" for i in range(3) for part in ("gate", "up", "down")]
    shapes = {**model.shapes, **dict.fromkeys(names, (16, 32))}
    del shapes["model.layers.2.mlp.experts.1.up_proj.weight"]
    assert "layer 2 of model.layers has no mlp.experts.1.up_proj.weight" in doubts(
        shapes, infer_anatomy(shapes, model.config), model.config
    )


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_complete_models_are_not_refused(tmp_path: Path, name: str) -> None:
    model = published(name, tmp_path)
    assert check_complete("m", model.config, model.shapes) == []


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2", "t5", "bert", "mixtral"])
def test_transformers_finds_every_tensor_that_is_removed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever raises the doubt, the names are compared as transformers loads them."""
    model = published(name, tmp_path)
    monkeypatch.setattr("merganser.engine.alignment.complete.doubts", lambda *_: ["a doubt"])
    # one expert of several is found by its number alone
    for removed in [each for each in model.shapes if "expert" not in each][::5]:
        shapes = {each: shape for each, shape in model.shapes.items() if each != removed}
        with pytest.raises(CheckpointError, match="needs tensors that none of the models has"):
            check_complete("m", model.config, shapes)


def test_a_head_that_the_user_leaves_out_is_not_missed(tmp_path: Path) -> None:
    models = [save(tmp_path / f"m{i}", "llama", vocab_size=96) for i in range(2)]
    recipe = make_recipe("linear", models, parameters={"weight": 0.5})
    shapes = {each.name: each.shape for each in plan(recipe).tensors}
    del shapes["lm_head.weight"]
    config = plan(recipe).config
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        check_complete("m", config, shapes)
    assert check_complete("m", config, shapes, ["lm_head.weight"]) == []


@pytest.mark.parametrize("name", sorted(_IN_EVERY_LAYER.keys() & ARCHITECTURES.keys()))
def test_the_table_has_what_every_layer_of_the_class_has(name: str) -> None:
    model = real(name)
    anatomy = infer_anatomy(model.shapes, model.config)
    layers: dict[int, set[str]] = {}
    for each, part in anatomy.parts.items():
        if part.layer is not None:
            layers.setdefault(part.layer, set()).add(each.split(f".{part.layer}.", 1)[1])
    assert set.intersection(*layers.values()) == _IN_EVERY_LAYER[name]


def test_slices_of_incomplete_layers_are_refused(tmp_path: Path) -> None:
    tensors = llama(0, 4)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    model = write_model(tmp_path / "m", tensors, llama_config(4))
    slices = [{"sources": [{"model": str(model), "layer_range": [0, 4]}]} for _ in range(2)]
    with pytest.raises(
        CheckpointError, match=r"layer 2: mlp\.up_proj\.weight|layer 2 of model.layers has no mlp.up_pr"
    ):
        plan({"merge_method": "passthrough", "slices": slices})
