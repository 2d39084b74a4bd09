"""Rotary settings in the keys of both generations of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from merganser.anatomy.settings.config import with_older_rotary_keys

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("kind", "rope", "older"),
    [
        ("Llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (
            "Llama",
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        ),
        (
            "Phi",
            {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25},
            {"rope_theta": 5e5, "partial_rotary_factor": 0.25},
        ),
    ],
)
def test_transformers_reads_the_same_with_and_without(kind: str, rope: dict[str, Any], older: dict[str, Any]) -> None:
    make = getattr(transformers, f"{kind}Config")
    written = make(rope_parameters=rope, max_position_embeddings=512).to_dict()
    found = with_older_rotary_keys(written)
    assert {key: value for key, value in found.items() if written.get(key) != value} == older
    assert make(**found).rope_parameters == make(**written).rope_parameters == written["rope_parameters"]
    # without the newer key, as older programs see it
    del found["rope_parameters"]
    assert make(**found).rope_parameters == written["rope_parameters"]


def test_what_is_said_already_and_what_has_no_older_key_stays() -> None:
    per_layer = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    both = {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    for config in ({"rope_parameters": per_layer}, {"rope_theta": 5.0}, {}, both, {"rope_parameters": None}):
        assert with_older_rotary_keys(config) == config
    inner = {"text_config": {"rope_scaling": None, "rope_parameters": {"rope_theta": 3.0, "rope_type": "default"}}}
    assert with_older_rotary_keys(inner)["text_config"]["rope_theta"] == 3.0
    assert "rope_theta" not in inner["text_config"]
