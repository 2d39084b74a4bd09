"""Which settings of two configs differ in a way that changes what the model computes."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from merganser.anatomy.settings.config import COUNT_KEYS
from merganser.anatomy.settings.defaults import MODEL_TYPES
from merganser.anatomy.settings.function import differences
from tests.making import llama_config


def between(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str]]:
    """Keys and kinds, the same in both directions."""
    found = [(each.key, each.kind) for each in differences(first, second)]
    assert sorted(found) == sorted((each.key, each.kind) for each in differences(second, first))
    return found


def changed(**settings: Any) -> list[tuple[str, str]]:
    """What a Llama and the same with other settings differ in."""
    return between({**llama_config(), "rope_theta": 10000.0}, {**llama_config(), "rope_theta": 10000.0, **settings})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_key_value_heads", 2),
        ("hidden_act", "gelu"),
        ("model_type", "gemma"),
        ("model_type", "cohere"),
        ("head_dim", 4),
    ],
)
def test_what_changes_the_meaning_of_tensors(key: str, value: Any) -> None:
    assert (key, "meaning") in changed(**{key: value})


def test_another_number_of_heads() -> None:
    assert changed(num_attention_heads=4, num_key_value_heads=2) == [
        ("num_attention_heads", "meaning"),
        ("num_key_value_heads", "meaning"),
        ("head_dim", "meaning"),
    ]


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [
        ("embedding_multiplier", 12.0, 6.0),
        ("residual_multiplier", 0.22, 1.0),
        ("logits_scaling", 8.0, 16.0),
        ("position_embedding_type", "absolute", "relative_key"),
        ("norm_topk_prob", True, False),
        ("use_parallel_residual", True, False),
        ("scale_embedding", True, False),
        ("alibi", True, False),
        ("query_pre_attn_scalar", 256, 144),
    ],
)
def test_settings_of_other_classes_that_change_the_meaning(key: str, one: Any, other: Any) -> None:
    own = {**llama_config(), "model_type": "own"}
    assert between({**own, key: one}, {**own, key: other}) == [(key, "meaning")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 1e6),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("sliding_window", 4096),
        ("rms_norm_eps", 1e-5),
        ("max_position_embeddings", 128),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("id2label", {"0": "spam", "1": "ham"}),
        ("is_decoder", True),
    ],
)
def test_what_changes_only_how_the_model_acts(key: str, value: Any) -> None:
    assert changed(**{key: value}) == [(key, "behaviour")]


@pytest.mark.parametrize(
    "settings",
    [
        {"torch_dtype": "bfloat16", "dtype": "float16", "transformers_version": "5.0.0", "_name_or_path": "x"},
        {"use_cache": False, "attention_dropout": 0.1, "initializer_range": 0.1, "temperature": 0.1, "top_p": 0.9},
        {"bos_token_id": 7, "eos_token_id": [7, 8], "pad_token_id": 9, "vocab_size": 33, "architectures": ["Own"]},
        {"unsloth_fixed": True, "auto_map": {"AutoModel": "own.Model"}, "quantization_config": {"bits": 4}},
        {"attention_bias": True, "mlp_bias": True, "intermediate_size": 99, "num_hidden_layers": 9},
        {"tie_word_embeddings": True},
        {"rope_scaling": None, "sliding_window": None, "head_dim": None, "mlp_only_layers": []},
        {"hidden_act": "swish"},
        {"head_dim": 8, "num_key_value_heads": 1},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}},
        {"model_type": "mistral", "sliding_window": None, "rms_norm_eps": 1e-6},
        {"embedding_multiplier": 1.0, "partial_rotary_factor": 1.0, "position_embedding_type": "absolute"},
        {"layer_types": ["full_attention", "full_attention"]},
    ],
)
def test_what_does_not_count(settings: dict[str, Any]) -> None:
    assert changed(**settings) == []


@pytest.mark.parametrize(
    "newer",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0}},
    ],
)
def test_rope_may_be_written_in_the_older_or_newer_way(newer: dict[str, Any]) -> None:
    older = {**llama_config(), "rope_theta": 10000.0, "rope_scaling": None}
    assert between(older, {**llama_config(), **newer}) == []
    assert between({**older, "rope_theta": 5e5}, {**llama_config(), **newer}) == [("rope_theta", "behaviour")]
    scaled = {"type": "linear", "factor": 2.0}
    assert between({**older, "rope_scaling": scaled}, {**llama_config(), **newer}) == [("rope_scaling", "behaviour")]
    both = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}}
    assert between({**older, "rope_scaling": scaled}, {**llama_config(), **both}) == []


def test_rope_by_kind_of_layer() -> None:
    older = {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    newer = {"model_type": "gemma3_text", "rope_parameters": nested}
    assert between(older, newer) == []
    assert between({**older, "rope_local_base_freq": 1e5}, newer) == [("rope_local_base_freq", "behaviour")]
    nested = {**nested, "sliding_attention": {"rope_type": "default", "rope_theta": 1e5}}
    assert between({**newer, "rope_parameters": nested}, newer) == [("rope_local_base_freq", "behaviour")]


def test_heads_that_follow_from_others() -> None:
    llama = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 64}
    assert between(llama, {**llama, "num_key_value_heads": 4, "head_dim": 16}) == []
    assert between(llama, {**llama, "num_key_value_heads": 2}) == [("num_key_value_heads", "meaning")]


def test_settings_that_a_class_reads_under_two_names() -> None:
    older = {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None}
    newer = {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    assert between(older, newer) == [("hidden_act", "behaviour")]
    assert between({**older, "hidden_activation": "gelu_pytorch_tanh"}, newer) == []
    gemma2 = {"model_type": "gemma2", "sliding_window": 4096}
    assert between({**gemma2, "sliding_window_size": 4096}, gemma2) == []
    assert between({"model_type": "gpt2", "n_ctx": 1024}, {"model_type": "gpt2", "n_ctx": 512}) == [
        ("n_positions", "behaviour")
    ]


def test_a_window_that_is_not_used() -> None:
    qwen = {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
    assert between(qwen, {**qwen, "sliding_window": 131072, "max_window_layers": 21}) == []
    assert ("sliding_window", "behaviour") in between(qwen, {**qwen, "use_sliding_window": True})


def test_the_default_of_a_class_stands_for_an_absent_setting() -> None:
    mistral = {"model_type": "mistral"}
    assert between(mistral, {**mistral, "sliding_window": 4096, "num_key_value_heads": 8}) == []
    assert between(mistral, {**mistral, "sliding_window": None}) == [("sliding_window", "behaviour")]
    assert between(mistral, {**mistral, "num_key_value_heads": 32}) == [("num_key_value_heads", "meaning")]
    assert between({"model_type": "gpt_neox"}, {"model_type": "gpt_neox", "use_parallel_residual": False}) == [
        ("use_parallel_residual", "meaning")
    ]
    # the same in the older and the newer spelling
    assert between({"model_type": "gpt_neox"}, {"model_type": "gpt_neox", "rotary_pct": 0.25}) == []
    assert between({"model_type": "gpt_neox"}, {"model_type": "gpt_neox", "rotary_pct": 1.0}) == [
        ("partial_rotary_factor", "meaning")
    ]


def test_what_a_class_takes_for_an_absent_setting_may_not_be_known() -> None:
    assert between({"model_type": "own"}, {"model_type": "own", "hidden_act": "relu"}) == [("hidden_act", "unknown")]


def test_settings_that_nobody_knows() -> None:
    assert changed(own_trick=3) == [("own_trick", "unknown")]
    assert changed(own_trick=False) == []


def test_model_types_that_nobody_knows() -> None:
    assert between({"model_type": "own"}, {"model_type": "llama"})[0] == ("model_type", "unknown")


def test_sub_configs() -> None:
    text = {key: value for key, value in llama_config().items() if key != "architectures"}
    vision = {"model_type": "siglip_vision_model", "num_attention_heads": 4}
    whole = {"model_type": "llava", "text_config": text, "vision_config": vision}
    assert between(whole, {**whole, "text_config": {**text, "num_attention_heads": 4}})[0] == (
        "num_attention_heads",
        "meaning",
    )
    other = {**whole, "vision_config": {**vision, "num_attention_heads": 2}}
    assert ("vision_config.num_attention_heads", "meaning") in between(whole, other)
    # older files have the language model's settings at the top
    assert between({"model_type": "llava", **text, "vision_config": vision}, whole) == []
    assert between({**whole, "vision_config": None}, whole) == [("vision_config", "unknown")]
    assert all(key for key, _ in between({"vision_config": vision}, whole))


def test_labels_in_another_order() -> None:
    first = {"id2label": {"0": "contradiction", "1": "neutral", "2": "entailment"}}
    second = {"id2label": {"0": "ENTAILMENT", "1": "NEUTRAL", "2": "CONTRADICTION"}}
    assert between({"model_type": "bert", **first}, {"model_type": "bert", **second}) == [("id2label", "meaning")]
    upper = {"id2label": {number: label.upper() for number, label in first["id2label"].items()}}
    assert between({"model_type": "bert", **first}, {"model_type": "bert", **upper}) == []


def test_kinds_of_layers_that_only_one_file_spells_out() -> None:
    rule = {"model_type": "gemma2", "num_hidden_layers": 4}
    types = ["sliding_attention", "full_attention"] * 2
    assert between(rule, {**rule, "layer_types": types}) == []
    assert between(rule, {**rule, "layer_types": types[::-1]}) == [("layer_types", "behaviour")]
    # other numbers of layers have other lists
    assert between({**rule, "num_hidden_layers": 2}, {**rule, "layer_types": types}) == []


@pytest.mark.parametrize(
    "hostile",
    [
        {"model_type": ["llama"]},
        {"model_type": {"llama": 1}, "rope_parameters": [1], "rope_scaling": "yarn", "id2label": [1]},
        {"num_attention_heads": "8", "hidden_size": [4], "head_dim": {}},
        {"num_attention_heads": 0, "num_hidden_layers": 10**18, "layer_types": 3},
        {"rope_parameters": {"full_attention": 3, "rope_theta": {}}, "id2label": {"x": None}},
        {"text_config": {"text_config": {"text_config": {"text_config": {"text_config": {"text_config": {}}}}}}},
        {"": {"": {}}, "a.b": 1},
    ],
)
def test_configs_of_no_sense_are_compared_all_the_same(hostile: dict[str, Any]) -> None:
    assert all(each.key is not None for each in differences(llama_config(), hostile))
    assert all(each.key is not None for each in differences(hostile, llama_config()))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_table_of_defaults_says_what_transformers_says(model_type: str) -> None:
    written = CONFIG_MAPPING[model_type]().to_dict()
    depth = {key: value for key, value in written.items() if key in COUNT_KEYS}
    found = differences({"model_type": model_type, **depth}, written)
    # lists and scalings are not part of the table
    assert [each for each in found if each.kind != "unknown" and each.first is not None] == []
    assert [each.key for each in found if each.kind == "meaning"] == []
