"""Configs of sliced checkpoints: transformers must build exactly the renamed tensors from them."""

import copy

import pytest

from merganser.anatomy import infer_anatomy, slice_config
from merganser.anatomy.settings.kinds import fit_period
from merganser.errors import CheckpointError, UnsupportedError
from tests.anatomy.architectures import build, load_config, names_in_memory, published, real

# Lists that newer versions of transformers write out and older ones derive.
DERIVED = ("layer_types", "no_rope_layers", "moe_layers", "mlp_layer_types")
SHAPED = [
    "llama",
    "qwen2",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "gpt2",
    "gpt_neo",
    "falcon",
    "mamba",
    "mixtral",
    "deepseek_v3",
    "jamba",
    "smollm3",
    "lfm2",
    "bert",
]


def choices(count):
    repeated = [*range(count - 1), *range(1, count)]
    return {"front": list(range(count - 1)), "back": list(range(1, count)), "repeated": repeated}


def sliced_names(anatomy, shapes, layers):
    """Return the names and shapes of the checkpoint made of these layers."""
    names = {}
    for name, part in anatomy.parts.items():
        if part.stack != anatomy.main:
            names[name] = shapes[name]
        for position, index in enumerate(layers):
            if part.stack == anatomy.main and part.layer == index:
                names[anatomy.rename_layer(name, position)] = shapes[name]
    return names


@pytest.mark.parametrize("choice", ["front", "back", "repeated"])
@pytest.mark.parametrize("name", SHAPED)
def test_transformers_builds_the_sliced_model(name, choice, tmp_path):
    found = real(name)
    anatomy = infer_anatomy(found.shapes, found.config)
    layers = choices(anatomy.n_layers)[choice]
    if name == "deepseek_v3" and choice == "repeated":
        layers = [0, 0, 1, 2, 3, 3]
    if name == "jamba" and choice == "repeated":
        layers = [0, 1, 2, 3, 4, 5] * 2
    sliced = slice_config(found.config, layers, anatomy=anatomy)
    config = load_config(sliced.config, tmp_path)
    assert names_in_memory(build(name, config)) == sliced_names(anatomy, found.shapes, layers)
    assert sliced.warnings == []


@pytest.mark.parametrize("spelled", [True, False], ids=["lists", "rules"])
@pytest.mark.parametrize("choice", ["back", "repeated"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("gemma3", {}),
        ("gpt_neo", {}),
        ("modernbert", {"global_attn_every_n_layers": 3}),
        ("smollm3", {}),
        ("lfm2", {}),
    ],
)
def test_layers_keep_their_kind(name, settings, choice, spelled, tmp_path):
    found = real(name)
    anatomy = infer_anatomy(found.shapes, found.config)
    config = copy.deepcopy(found.config) | settings
    scope = config.get("text_config", config)
    for key in DERIVED:
        scope.pop(key, None)
    before = load_config(config, tmp_path).get_text_config()
    kinds = {key: list(getattr(before, key)) for key in (*DERIVED, "attention_layers") if getattr(before, key, None)}
    assert any(len(set(values)) > 1 for values in kinds.values())
    if spelled:
        scope.update(kinds)
    layers = choices(anatomy.n_layers)[choice]
    if name == "modernbert":
        layers[0] = 0
    after = load_config(slice_config(config, layers, anatomy=anatomy).config, tmp_path).get_text_config()
    assert {key: getattr(after, key) for key in kinds} == {
        key: [values[index] for index in layers] for key, values in kinds.items()
    }


def test_published_per_expert_names_are_sliced_too(tmp_path):
    found = published("mixtral", tmp_path)
    anatomy = infer_anatomy(found.shapes, found.config)
    names = sliced_names(anatomy, found.shapes, [3, 0])
    assert "model.layers.1.block_sparse_moe.experts.2.w1.weight" in names
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}
    assert slice_config(found.config, [3, 0], anatomy=anatomy).config["num_hidden_layers"] == 2


def four_layers(**config):
    shapes = {f"model.layers.{index}.mlp.up_proj.weight": (8, 8) for index in range(4)}
    config = {"num_hidden_layers": 4, **config}
    return config, infer_anatomy(shapes, config)


def sliced(layers, **settings):
    config, anatomy = four_layers(**settings)
    return slice_config(config, layers, anatomy=anatomy)


def test_choosing_all_layers_changes_nothing():
    config, anatomy = four_layers(layer_types=list("abcd"), sliding_window_pattern=3, num_kv_shared_layers=2)
    result = slice_config(config, range(4), anatomy=anatomy)
    assert (result.config, result.warnings) == (config, [])
    assert result.config is not config


def test_every_key_that_held_the_count_is_set():
    result = sliced(
        [0, 1], n_layer=4, num_layers=8, text_config={"n_layers": 4}, vision_config={"num_hidden_layers": 4}
    )
    assert result.config == {
        "num_hidden_layers": 2,
        "n_layer": 2,
        "num_layers": 8,
        "text_config": {"n_layers": 2},
        "vision_config": {"num_hidden_layers": 4},
    }
    assert result.warnings == []


def test_a_list_of_kinds_may_stand_for_the_count():
    shapes = {f"model.layers.{index}.mlp.up_proj.weight": (8, 8) for index in range(4)}
    config = {"text_config": {"layers_block_type": list("abcd")}}
    result = slice_config(config, [1, 1], anatomy=infer_anatomy(shapes, config))
    assert (result.config, result.warnings) == ({"text_config": {"layers_block_type": ["b", "b"]}}, [])


@pytest.mark.parametrize("tower", ["qformer_config", "dit_config", "vision_config"])
def test_towers_of_as_many_layers_keep_theirs(tower):
    result = sliced([0, 1], **{tower: {"num_hidden_layers": 4}})
    assert result.config == {"num_hidden_layers": 2, tower: {"num_hidden_layers": 4}}


def test_a_missing_count_is_added():
    config, anatomy = four_layers()
    del config["num_hidden_layers"]
    result = slice_config(config, [2], anatomy=anatomy)
    assert result.config == {"num_hidden_layers": 1}
    assert len(result.warnings) == 1


def test_a_count_that_contradicts_the_file_is_refused():
    _, anatomy = four_layers()
    with pytest.raises(CheckpointError, match="the file has 4 layers, the config says num_hidden_layers=6"):
        slice_config({"num_hidden_layers": 6}, [0], anatomy=anatomy)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("layer_types", ["a", "b", "c", "d"], ["d", "b", "b"]),
        ("intermediate_size", [1, 2, 3, 4], [4, 2, 2]),
        ("block_configs", [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}], [{"n": 4}, {"n": 2}, {"n": 2}]),
        ("no_rope_layers", [1, 1, 1, 0], [0, 1, 1]),
        ("no_rope_layers", [0, 1, 1, 1], [1, 1, 1]),
        ("layer_types", ["a", "b"], ["a", "b"]),
        ("mlp_only_layers", [1], [1, 2]),
        ("mlp_only_layers", [], []),
        ("full_attn_idxs", [0, 3], [0]),
        ("attn_layer_indices", [0, 1, 2, 3], [0, 1, 2]),
        ("hybrid_layer_ids", [3], [0]),
        ("moe_layers", [0, 2], []),
        ("hybrid_override_pattern", "M-*E", "E--"),
        ("attention_types", [[["global", "local"], 2]], [[["local", "local", "local"], 1]]),
        ("eos_token_id", [5, 6, 7, 8], [5, 6, 7, 8]),
        ("architectures", ["a", "b", "c", "d"], ["a", "b", "c", "d"]),
        ("suppress_tokens", [1, 2, 3, 4], [1, 2, 3, 4]),
        ("rope_scaling", {"factor": [1, 2, 3, 4]}, {"factor": [1, 2, 3, 4]}),
        ("block_types", ["r", "a"], ["a", "a", "a"]),
        ("per_layer_config", {"01": {"n": 1}, "02": {"n": 2}}, {"1": {"n": 1}, "2": {"n": 1}}),
        ("linear_attn_config", {"kda_layers": [1, 2], "head_dim": 4}, {"kda_layers": [2, 3], "head_dim": 4}),
        ("sparse_attention_config", {"sparse_attention_freq": [0, 1, 1, 0]}, {"sparse_attention_freq": [0, 1, 1]}),
        ("moe_layers_enum", "2,3", "0"),
        ("index_topk_pattern", "FSFS", "SSS"),
        ("deepstack_visual_indexes", [3], [2]),
        ("feature_layer", -2, -2),
        ("backbone_out_indices", [3], [2]),
        ("out_features", ["stage4"], ["stage3"]),
        ("stage_names", ["stem", "stage1", "stage2", "stage3", "stage4"], ["stem", "stage1", "stage2", "stage3"]),
        ("target_layer_ids", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("mtp_layer_types", ["a", "b", "c", "d"], ["a", "b", "c", "d"]),
    ],
)
def test_lists(key, value, expected):
    result = sliced([3, 1, 1], **{key: value})
    assert result.config == {"num_hidden_layers": 3, key: expected}
    assert result.warnings == []


def test_dense_layers_between_experts():
    config = sliced([0, 1, 1, 3], decoder_sparse_step=2, mlp_only_layers=[3]).config
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [0, 3])
    config = sliced([1, 3, 3], decoder_sparse_step=1, mlp_only_layers=[3]).config
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [1, 2])


def test_leading_dense_layers():
    assert sliced([0, 0, 1, 2], first_k_dense_replace=2).config["first_k_dense_replace"] == 3
    assert sliced([2, 3], first_k_dense_replace=2).config["first_k_dense_replace"] == 0
    with pytest.raises(UnsupportedError, match="first_k_dense_replace=1: dense layers would follow layers with expert"):
        sliced([0, 3, 0], first_k_dense_replace=1)
    result = sliced([0, 3, 0], first_k_dense_replace=1, model_type="glm4_moe_lite")
    assert result.config["mlp_layer_types"] == ["dense", "sparse", "dense"]
    result = sliced([0, 3, 0], first_k_dense_replace=1, moe_layer_freq=[1, 0, 1, 1])
    assert (result.config["first_k_dense_replace"], result.config["moe_layer_freq"]) == (0, [0, 1, 0])
    assert sliced([0, 1, 1], num_dense_layers=1).config["num_dense_layers"] == 1
    with pytest.raises(UnsupportedError, match="num_dense_layers=1: dense layers would follow others"):
        sliced([1, 0], num_dense_layers=1)
    kinds = ["dense", "sparse", "sparse", "sparse"]
    result = sliced([0, 3, 0], first_k_dense_replace=1, mlp_layer_types=kinds)
    assert result.config["mlp_layer_types"] == ["dense", "sparse", "dense"]
    assert result.warnings == []


def test_the_window_starts_behind_the_same_layers():
    settings = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    result = sliced([1, 2, 3], **settings)
    assert result.config["max_window_layers"] == 1
    assert result.config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert result.warnings == []
    assert len(sliced([0, 2, 1], **settings).warnings) == 1
    assert sliced([1, 2], max_window_layers=2, use_sliding_window=False).config["max_window_layers"] == 2


def test_periods_with_offsets():
    result = sliced([1, 2, 3], attn_layer_period=4, attn_layer_offset=2)
    assert (result.config["attn_layer_period"], result.config["attn_layer_offset"]) == (4, 1)
    with pytest.raises(UnsupportedError, match="attn_layer_period=2, attn_layer_offset=1: the layers no longer alter"):
        sliced([0, 1, 2, 1, 3], attn_layer_period=2, attn_layer_offset=1)
    assert sliced([0, 2], cross_attention_frequency=2).config["cross_attention_frequency"] == 1
    with pytest.raises(UnsupportedError, match="cross_attention_frequency=2: "):
        sliced([1, 2, 3], cross_attention_frequency=2)
    with pytest.raises(UnsupportedError, match="n_layers_per_attn_res_block=2: "):
        sliced([1, 2], n_layers_per_attn_res_block=2)


def test_a_range_of_layers_with_experts():
    settings = {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1}

    def rule(layers, **changed):
        config = sliced(layers, **{**settings, **changed}).config
        return [config[key] for key in settings]

    assert rule([0, 1, 2]) == [1, 2, 1]
    assert rule([0, 0, 3]) == [2, 2, 1]
    assert rule([1, 2, 3], moe_layer_end_index=2) == [0, 1, 1]
    assert rule([0, 0, 1]) == [2, 2, 1]
    first, last, _ = rule([0, 0])
    assert first > last
    assert rule([0, 1, 2, 3], moe_layer_interval=2)[2] == 2
    with pytest.raises(UnsupportedError, match="moe_layer_start_index=1, moe_layer_interval=1: layers with experts"):
        sliced([1, 0, 2], **settings)


def test_layers_that_share_keys_and_values():
    assert sliced([0, 1, 3], num_kv_shared_layers=2).config["num_kv_shared_layers"] == 1
    assert sliced([0, 1], num_kv_shared_layers=2).config["num_kv_shared_layers"] == 0
    with pytest.raises(UnsupportedError, match="num_kv_shared_layers=2: layers with keys of their own would follow"):
        sliced([0, 3, 1], num_kv_shared_layers=2)
    assert sliced([0, 1, 0, 1], kv_source_layers=[0, 0, 2, 2]).config["kv_source_layers"] == [0, 0, 2, 2]
    assert sliced([2, 3, 3], kv_source_layers=[0, 0, 2, 2]).config["kv_source_layers"] == [0, 0, 0]
    with pytest.raises(UnsupportedError, match="kv_source_layers: layer 3 would lack layer 2, its source"):
        sliced([0, 3], kv_source_layers=[0, 0, 2, 2])
    assert sliced([0, 1], indexer_types=["full", "shared"] * 2).config["indexer_types"] == ["full", "shared"]
    with pytest.raises(UnsupportedError, match="indexer_types: layer 1 would be first"):
        sliced([1, 2], indexer_types=["full", "shared"] * 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size_per_layer_input": 8}, "a table outside the layers has columns for each"),
        ({"scale_attn_by_inverse_layer_idx": True}, "divided by the layer's number"),
        ({"use_weighted_layer_sum": True}, "a weight for each"),
        ({"depths": [2, 2, 6, 2]}, "stages"),
        ({"num_mem_blocks": 2}, "shared blocks"),
        ({"model_type": "gemma4_text", "layer_types": ["full_attention"] + ["sliding_attention"] * 3}, "last layer"),
        ({"model_type": "zamba2"}, "layers_block_type of model_type zamba2 is absent"),
        (
            {"deepstack_visual_indexes": [0, 2]},
            "deepstack_visual_indexes reads the output of layer 0, which is chosen 0",
        ),
        ({"out_indices": [3, 4]}, "out_indices reads the output of layer 2, which is chosen 2 times"),
    ],
)
def test_what_no_config_says_is_refused_by_name(settings, message):
    with pytest.raises(UnsupportedError, match=message) as raised:
        sliced([1, 2, 2, 3], **settings)
    assert str(raised.value).startswith("config.json: ")


def test_what_goes_by_number_holds_for_the_first_layers():
    for settings in ({"scale_attn_by_inverse_layer_idx": True}, {"num_mem_blocks": 2}):
        assert sliced([0, 1], **settings).config == {"num_hidden_layers": 2, **settings}
    assert sliced([3, 2], scale_attn_by_inverse_layer_idx=False, num_mem_blocks=1, depths=None).warnings == []


def test_each_layer_keeps_the_scale_of_its_residual():
    assert sliced([2], scale_depth=1.5).config["scale_depth"] == 0.75


def test_fit_period():
    assert fit_period([True, False, True, False], 2, 0) == (2, 0)
    assert fit_period([False, True, False, False, True], 8, 4) == (3, 1)
    assert fit_period([False, False], 1, 0) == (3, 2)
    assert fit_period([True, True], 4, 0) == (1, 0)
    assert fit_period([True, True, False], 2, 0) is None


def test_a_stale_rule_is_named_and_a_good_one_is_kept():
    result = sliced([1, 2, 3], sliding_window_pattern=2)
    assert result.config["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    assert len(result.warnings) == 1
    assert "sliding_window_pattern=2 does not describe the chosen layers" in result.warnings[0]
    assert sliced([0, 1, 2], sliding_window_pattern=2).warnings == []


@pytest.mark.parametrize(
    "settings", [{"num_kv_shared_layers_of_blocks": 1}, {"dense_block_step": 2}, {"moe_every_n_layers": 2}]
)
def test_rules_that_are_not_understood_are_named(settings):
    result = sliced([1, 2, 3], **settings)
    ((key, value),) = settings.items()
    assert result.warnings == [f"{key}={value} depends on the position of layers and is left as it is"]


@pytest.mark.parametrize(("layers", "refused"), [([0, 1, 1], False), ([1, 2], True), ([0, 1, 0], True)])
def test_a_first_layer_with_other_norms_must_stay_first(layers, refused):
    found = real("modernbert")
    anatomy = infer_anatomy(found.shapes, found.config)
    if not refused:
        assert slice_config(found.config, layers, anatomy=anatomy).warnings == []
        return
    with pytest.raises(UnsupportedError, match="layer 0 has other norms than the rest, so it must stay first and al"):
        slice_config(found.config, layers, anatomy=anatomy)


@pytest.mark.parametrize("layers", [[], [4], [-1], [0, 1, 7]])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match="layers: "):
        sliced(layers)


def test_what_cannot_be_sliced_is_refused():
    found = real("t5")
    with pytest.raises(UnsupportedError, match=r"found encoder\.block, decoder\.block"):
        slice_config(found.config, [0], anatomy=infer_anatomy(found.shapes, found.config))


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"])
def test_prediction_layers_stay_behind_the_last_layer(key):
    config, anatomy = four_layers(num_hidden_layers=3, layer_types=list("abcp"), **{key: 1})
    assert anatomy.n_layers == 3
    behind = "model.layers.3.mlp.up_proj.weight"
    assert [name for name in anatomy.parts if anatomy.is_prediction_layer(name)] == [behind]
    assert anatomy.rename_behind(behind, 5) == "model.layers.5.mlp.up_proj.weight"
    assert anatomy.rename_behind("model.layers.2.mlp.up_proj.weight", 5) == "model.layers.2.mlp.up_proj.weight"
    result = slice_config(config, [0, 1, 1, 2, 2], anatomy=anatomy)
    assert result.config == {"num_hidden_layers": 5, "layer_types": list("abbccp"), key: 1}
