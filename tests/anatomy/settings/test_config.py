"""Ties and dtype of a config."""

import pytest
import transformers

from merganser.anatomy import is_tied, set_config_dtype, set_tied
from merganser.anatomy.settings import config as module
from tests.anatomy.architectures import ARCHITECTURES

TABLE = sorted(module._TIED_BY_DEFAULT | module._UNTIED_BY_DEFAULT)


def test_defaults_are_those_of_transformers():
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    ours = {kind: is_tied({"model_type": kind}) for kind in TABLE if kind in known}
    theirs = {kind: known[kind]().tie_word_embeddings for kind in ours}
    assert len(ours) > 100
    assert ours == theirs


def test_every_tested_language_model_has_a_default():
    kinds = {kind for kind, _, _ in ARCHITECTURES.values()}
    assert {kind for kind in kinds if is_tied({"model_type": kind}) is None} == set()


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, None),
        ({"model_type": "unheard_of"}, None),
        ({"model_type": "llama"}, False),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "gpt2", "tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": None, "model_type": "gpt2"}, True),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"model_type": "unheard_of", "text_config": {"model_type": "gemma3_text"}}, True),
        ({"model_type": "unheard_of", "text_decoder_config": {"model_type": "llama"}}, False),
        ({"model_type": "unheard_of", "vision_config": {"tie_word_embeddings": True}}, None),
    ],
)
def test_is_tied(config, tied):
    assert is_tied(config) is tied


def test_set_tied_writes_where_the_flag_lives():
    config = {"text_config": {"tie_word_embeddings": True}, "vision_config": {"tie_word_embeddings": True}}
    assert set_tied(config, False) == {
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False},
        "vision_config": {"tie_word_embeddings": True},
    }
    assert config["text_config"] == {"tie_word_embeddings": True}
    assert set_tied({"text_config": {}}, True) == {"text_config": {}, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float16"}, {"dtype": "bfloat16"}),
        ({"dtype": "float16", "torch_dtype": "float16"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        (
            {"torch_dtype": None, "text_config": {"dtype": "float32"}, "vision_config": {"torch_dtype": "float32"}},
            {
                "torch_dtype": "bfloat16",
                "text_config": {"dtype": "bfloat16"},
                "vision_config": {"torch_dtype": "bfloat16"},
            },
        ),
        (
            {"text_config": {}, "quantization_config": {"dtype": "int8"}},
            {"text_config": {}, "quantization_config": {"dtype": "int8"}, "torch_dtype": "bfloat16"},
        ),
    ],
)
def test_set_config_dtype(config, expected):
    assert set_config_dtype(config, "bfloat16") == expected
