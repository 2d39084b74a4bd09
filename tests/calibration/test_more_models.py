"""Models that do something of their own: tables beside the tokens, padding that is seen, shared weights, odd configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import merganser
from merganser.calibration.forward.internals import build_skeleton
from merganser.checkpoint import Reader
from merganser.errors import CheckpointError, DataError, UnsupportedError
from merganser.statistics import Statistics
from tests.calibration.families import VOCAB
from tests.evaluation.tiny import add_tokenizer, text

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _saved(folder: Path, kind: str, config: Any) -> Path:
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def _texts(folder: Path, words: tuple[int, ...]) -> Path:
    file = folder / "d.jsonl"
    file.write_text("\n".join(json.dumps({"text": text(i, count)}) for i, count in enumerate(words)))
    return file


def _read(found: Statistics, statistic: str, tensor: str) -> torch.Tensor:
    with Reader() as reader:
        return found.read(reader, statistic, tensor)


def test_tables_of_distances_are_not_counted_as_tokens(tmp_path: Path) -> None:
    """DeBERTa multiplies a table by the same matrices as the tokens; here it has as many rows as there are tokens."""
    file = _texts(tmp_path, (30,))
    for kind, table in (("DebertaV2", {"position_buckets": 8, "share_att_key": True}), ("Deberta", {})):
        keys = {**_SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], **table}
        config = getattr(transformers, f"{kind}Config")(**keys, max_relative_positions=8, position_biased_input=False)
        model = _saved(tmp_path / kind, f"{kind}ForMaskedLM", config)
        found = merganser.calibrate(model, file, tmp_path / f"of-{kind}", length=16, sequences=1)
        counts = {int(_read(found, "count", name)) for name in found.tensors}
        assert counts == {found.about["parts"][0]["tokens"]} == {16}
        assert not [name for name in found.tensors if "pos_proj" in name]
        plan = merganser.calibration.plan_calibration(model, file, length=16, sequences=1)
        assert plan.statistics_bytes == found.nbytes


def test_models_that_see_padding_never_get_any(tmp_path: Path) -> None:
    """FNet mixes all tokens of a sequence, padding too; MobileBERT's embeddings look at their neighbours."""
    file = _texts(tmp_path, (4, 9, 6, 9))
    models = {
        "FNetForMaskedLM": transformers.FNetConfig(**_SMALL),
        "MobileBertForMaskedLM": transformers.MobileBertConfig(**_SMALL, embedding_size=16, intra_bottleneck_size=16),
    }
    for kind, config in models.items():
        model = _saved(tmp_path / kind, kind, config)
        one = merganser.calibrate(model, file, tmp_path / f"{kind}-one", batch_tokens=1)
        all_ = merganser.calibrate(model, file, tmp_path / f"{kind}-all")
        for name in one.tensors:
            torch.testing.assert_close(_read(all_, "gram", name), _read(one, "gram", name), rtol=1e-4, atol=1e-4)


def test_configs_without_special_tokens(tmp_path: Path) -> None:
    config = transformers.CodeGenConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    model = _saved(tmp_path / "model", "CodeGenForCausalLM", config)
    assert len(merganser.calibrate(model, _texts(tmp_path, (9, 4)), tmp_path / "out").tensors) == 8


def test_where_a_decoder_begins(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"prompt": text(0, 5), "completion": text(1, 4)}))
    half = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 2}
    config = transformers.T5GemmaConfig(
        encoder=half, decoder={**half, "cross_attention_hidden_size": 32}, vocab_size=VOCAB
    )
    model = _saved(tmp_path / "model", "T5GemmaForConditionalGeneration", config)
    # the decoder's own begin of a text
    assert len(merganser.calibrate(model, file, tmp_path / "out").tensors) == 36
    bart = transformers.MBartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    )
    other = _saved(tmp_path / "other", "MBartForConditionalGeneration", bart)
    with pytest.raises(CheckpointError, match="has a decoder_start_token_id, so it is not known"):
        merganser.calibrate(other, file, tmp_path / "new")
    (other / "generation_config.json").write_text('{"decoder_start_token_id": 2}')
    assert merganser.calibrate(other, file, tmp_path / "new").tensors


def test_an_image_tower_as_deep_as_the_decoder_is_no_stack(tmp_path: Path) -> None:
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **_SMALL}
    config = transformers.LlavaConfig(
        text_config={**_SMALL, "model_type": "llama"}, vision_config=vision, image_token_index=300
    )
    model = _saved(tmp_path / "model", "LlavaForConditionalGeneration", config)
    found = merganser.calibrate(model, _texts(tmp_path, (9, 4)), tmp_path / "out")
    assert len(found.tensors) == 14
    assert not [name for name in found.tensors if "vision" in name]


def test_positions_that_a_padding_token_takes_are_not_offered(tmp_path: Path) -> None:
    model = _saved(
        tmp_path / "model", "RobertaForMaskedLM", transformers.RobertaConfig(**{**_SMALL, "pad_token_id": 1})
    )
    file = _texts(tmp_path, (90,))
    with pytest.raises(DataError, match="length: 64 tokens, but the model sees at most 62 at once"):
        merganser.calibrate(model, file, tmp_path / "out", length=64)
    assert merganser.calibrate(model, file, tmp_path / "out").about["parts"][0]["length"] == 62


_REFUSED: dict[str, tuple[str, Any, str]] = {
    "shared": (
        "Zamba2ForCausalLM",
        lambda: transformers.Zamba2Config(
            **{**_SMALL, "num_hidden_layers": 4},
            num_key_value_heads=4,
            mamba_d_state=8,
            mamba_ngroups=1,
            n_mamba_heads=8,
            mamba_headdim=8,
            hybrid_layer_ids=[1, 3],
            layers_block_type=["mamba", "hybrid"] * 2,
            num_mem_blocks=1,
        ),
        r"model\.layers\.3\.shared_transformer\..* is the same as model\.layers\.1\.shared_transformer\..* of another block",
    ),
    "own classes": (
        "IBertForMaskedLM",
        lambda: transformers.IBertConfig(**_SMALL),
        "IBertForMaskedLM multiplies by classes of its own",
    ),
    "a length": (
        "NystromformerForMaskedLM",
        lambda: transformers.NystromformerConfig(**_SMALL, num_landmarks=1, segment_means_seq_len=7),
        r"d\.jsonl:1: NystromformerForMaskedLM fails for this text, in nystromformer\.encoder\.layer\.0 \(RuntimeError",
    ),
    "all lengths": (
        "NystromformerForMaskedLM",
        lambda: transformers.NystromformerConfig(**_SMALL, num_landmarks=4),
        r"NystromformerForMaskedLM cannot be run one block at a time: its forward fails \(RuntimeError",
    ),
}


@pytest.mark.parametrize("reason", _REFUSED)
def test_models_that_are_refused(reason: str, tmp_path: Path) -> None:
    kind, make, message = _REFUSED[reason]
    model = _saved(tmp_path / "model", kind, make())
    file = _texts(tmp_path, (9, 4))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UnsupportedError, match=message) as found:
        merganser.calibrate(model, file, tmp_path / "out")
    assert "\n" not in str(found.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_padding_token_that_the_model_does_not_have_is_not_used(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    config.pad_token_id = 320
    model = _saved(tmp_path / "model", "GPT2LMHeadModel", config)
    found = merganser.calibrate(model, _texts(tmp_path, (9, 4)), tmp_path / "out")
    assert found.about["parts"][0]["sequences"] == 2


def test_no_part_of_a_model_keeps_a_cache() -> None:
    vision = {"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4, **_SMALL}
    config = transformers.Gemma3Config(text_config={**_SMALL, "head_dim": 8}, vision_config=vision)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    model = build_skeleton(config, torch.float32)
    assert not model.config.use_cache
    assert not model.config.text_config.use_cache
