"""Read and change a config.json: the settings of the language model, tied embeddings and dtype."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...checkpoint.formats.quantised.evidence import SETTINGS_KEYS

__all__ = [
    "COUNT_KEYS",
    "KNOWN_TYPES",
    "PREDICTION_KEYS",
    "as_int",
    "is_tied",
    "layer_counts",
    "model_types",
    "set_config_dtype",
    "set_tied",
    "text_scopes",
    "unquantised",
    "with_older_rotary_keys",
    "words",
]


def words(text: str) -> frozenset[str]:
    """Return the set of words in a string; tables of names are written as one string."""
    return frozenset(text.split())


# All keys under which published configs store the number of layers.
COUNT_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_transformer_layers",
    "n_blocks",
    "num_blocks",
    "depth",
    "layers",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
)

# All keys under which published configs store the number of multi-token prediction layers after the last layer.
PREDICTION_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")

# Sub-configs of parts other than the language model, such as vision towers.
_SIDE_CONFIG = re.compile(
    r"vision|visual|vit_|image|audio|speech|sound|projector|qformer|vq|quant|talker|token2wav|codec|code_|draft|dit_"
)

# Only families whose config class defines the flag are listed; for others an absent key has no known meaning.
_TIED_BY_DEFAULT = words(
    """albert bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert
    cohere cohere2 convbert ctrl data2vec-text deberta deberta-v2 distilbert electra ernie ernie4_5 ernie4_5_moe esm
    falcon falcon_mamba flaubert fnet gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gpt-sw3 gpt2 gpt_bigcode
    gpt_neo ibert internvl jetmoe led lfm2 lfm2_moe longformer longt5 m2m_100 mamba marian mbart megatron-bert
    mistral3 mobilebert modernbert modernbert-decoder mpnet mpt mt5 mvp nllb-moe openai-gpt opt paligemma pegasus
    pegasus_x plbart recurrent_gemma roberta roberta-prelayernorm roformer smollm3 starcoder2 switch_transformers t5
    t5gemma umt5 vaultgemma whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod zamba zamba2"""
)
_UNTIED_BY_DEFAULT = words(
    """apertus arcee bamba bitnet codegen dbrx deepseek_v2 deepseek_v3 diffllama dots1 exaone4 falcon_h1 glm glm4
    glm4_moe gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium idefics2 idefics3
    jamba llama llama4 llama4_text llava llava_next mamba2 minimax mistral mixtral mllama_text_model nemotron
    nemotron_h olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_moe
    qwen3_next qwen3_vl rembert rwkv seed_oss smolvlm stablelm"""
)
KNOWN_TYPES = _TIED_BY_DEFAULT | _UNTIED_BY_DEFAULT
"""Model types of transformers that include a language model."""


def text_scopes(config: Mapping[str, Any], depth: int = 4) -> Iterator[dict[str, Any]]:
    """Yield the dicts that describe the language model: the config itself, then `text_config` and similar sub-configs.

    Sub-configs of vision and audio towers, of quantisation and the like are skipped, and so are dicts nested deeper
    than `depth`.
    """
    yield config  # type: ignore[misc]  # callers that write pass the copy they made, a dict
    for key, value in config.items() if depth else ():
        nested = isinstance(value, dict) and (key.endswith("_config") or key in ("text", "llm", "language_model"))
        if nested and not _SIDE_CONFIG.search(key):
            yield from text_scopes(value, depth - 1)


def model_types(config: Mapping[str, Any]) -> list[str]:
    """Return the `model_type` of each text scope, outermost first."""
    return [scope["model_type"] for scope in text_scopes(config) if isinstance(scope.get("model_type"), str)]


def layer_counts(config: Mapping[str, Any]) -> set[int]:
    """Return all numbers of layers in the text scopes, under any of `COUNT_KEYS`."""
    return {
        count for scope in text_scopes(config) for key in COUNT_KEYS if (count := as_int(scope.get(key))) is not None
    }


def as_int(value: object) -> int | None:
    """Return `value` if it is an integer and not a bool, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Return whether the output head shares the input embedding.

    The outermost explicit `tie_word_embeddings` decides; without one, the default of the model type.

    Returns:
        None if the config has no flag and the model type is unknown.
    """
    for scope in text_scopes(config):
        flag = scope.get("tie_word_embeddings")
        if isinstance(flag, bool):
            return flag
    for model_type in model_types(config):
        if model_type in _TIED_BY_DEFAULT:
            return True
        if model_type in _UNTIED_BY_DEFAULT:
            return False
    return None


def set_tied(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Return a copy with `tie_word_embeddings` set at the top level and in every text sub-config that has the key."""
    result = copy.deepcopy(dict(config))
    for scope in text_scopes(result):
        if scope is result or "tie_word_embeddings" in scope:
            scope["tie_word_embeddings"] = tied
    return result


def set_config_dtype(config: Mapping[str, Any], dtype_name: str) -> dict[str, Any]:
    """Return a copy with `dtype_name` wherever the config declares a dtype, including sub-configs of towers.

    Both spellings, `dtype` and `torch_dtype`, are kept. A config that has neither gets `torch_dtype`, which
    every version of transformers reads.

    Args:
        config: The contents of config.json.
        dtype_name: For example "bfloat16", without "torch.".
    """
    result = copy.deepcopy(dict(config))
    _replace_dtype(result, dtype_name)
    if "dtype" not in result and "torch_dtype" not in result:
        result["torch_dtype"] = dtype_name
    return result


def _replace_dtype(scope: dict[str, Any], dtype_name: str) -> None:
    for key in ("dtype", "torch_dtype"):
        if key in scope:
            scope[key] = dtype_name
    for key, value in scope.items():
        if isinstance(value, dict) and key.endswith("_config") and "quant" not in key:
            _replace_dtype(value, dtype_name)


def unquantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy without the settings of a quantisation, at the top or in the config of a part."""
    return {
        key: {name: each for name, each in value.items() if name not in SETTINGS_KEYS}
        if key.endswith("_config") and isinstance(value, dict)
        else value
        for key, value in config.items()
        if key not in SETTINGS_KEYS
    }


def with_older_rotary_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that says its rotary settings in the keys of transformers 4, too, where it has only `rope_parameters`.

    transformers 5 writes `rope_parameters` alone. transformers 4 and programs with loaders of their own (mlx-lm 0.32) know
    `rope_theta`, `partial_rotary_factor` and `rope_scaling`, and take a default where these are missing, without a word.
    transformers 5 reads the same from both. Settings per kind of layer, which have no such keys in common, are left alone.
    """
    result = copy.deepcopy(dict(config))
    for scope in text_scopes(result):
        rope = scope.get("rope_parameters")
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            continue
        older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = {key: value for key, value in rope.items() if key not in older}
        scope |= {key: value for key, value in older.items() if scope.get(key) is None}
    return result
