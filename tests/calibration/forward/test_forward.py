"""The streamed forward gives what the model's own forward gives, with one block in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merganser.calibration.data.batches import Batch, Sample, Tokens, make_batches
from merganser.calibration.forward import internals
from merganser.calibration.forward.experts import expert_modules
from merganser.calibration.forward.forward import check_streamable
from merganser.calibration.forward.skeleton import Skeleton
from merganser.calibration.forward.stream import Stream, StreamState
from merganser.calibration.sums.taps import Taps
from merganser.checkpoint import open_checkpoint
from merganser.errors import CheckpointError, NonFiniteError, UnsupportedError
from tests.calibration.families import FAMILIES, VOCAB, save

LENGTHS = (11, 7, 9, 11)


def _batches(stacks: int, lengths: tuple[int, ...] = LENGTHS, budget: int = 33) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> Tokens:
        return Tokens(tuple(torch.randint(3, VOCAB, (count,), generator=generator).tolist()), (True,) * count)

    return make_batches([Sample(tuple(tokens(length) for _ in range(stacks)), "here") for length in lengths], budget, 0)


def _probe(stacks: int) -> Batch:
    return _batches(stacks, (6, 6), 100)[0]


def _stream(folder: Path, model: Path, **options: Any) -> tuple[Skeleton, Stream]:
    skeleton = Skeleton(open_checkpoint(str(model)))
    skeleton.fill_outside(head=True)
    folder.mkdir(exist_ok=True)
    stacks = 2 if skeleton.is_encoder_decoder else 1
    return skeleton, Stream(skeleton, _batches(stacks), folder, **options)


def _run(skeleton: Skeleton, stream: Stream) -> None:
    for block in skeleton.blocks[stream.state.done :]:
        with skeleton.filled(block):
            stream.advance(lambda batch: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    save(tmp_path / "model", family)
    _check_logits(tmp_path, family, torch.float32)


def _check_logits(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    skeleton, stream = _stream(tmp_path / "spool", tmp_path / "model")
    with skeleton:
        check_streamable(skeleton, _probe(len(stream.batches[0].stacks)))
        _run(skeleton, stream)
        assert {padded.full for batch in stream.batches for padded in batch.stacks} == {True, False}
        whole = getattr(transformers, FAMILIES[family][1]).from_pretrained(tmp_path / "model").eval()
        for number, batch in enumerate(stream.batches):
            with torch.no_grad():
                expected = whole(**batch.inputs(), use_cache=False).logits
            assert expected.dtype == dtype
            valid = batch.stacks[-1].valid
            found = stream.logits(number)
            if expert_modules(skeleton.model) and not bool(valid.all()):
                # experts multiply what the router sends them, padding too, and how many rows a product has decides in
                # which order it is summed
                torch.testing.assert_close(found[valid], expected[valid])
            else:
                assert torch.equal(found[valid], expected[valid])


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("gemma3", torch.bfloat16),
        ("mixtral", torch.bfloat16),
        ("deepseek-v3", torch.bfloat16),
        # a part of T5's blocks stays in float32 where the rest is float16
        ("t5", torch.float16),
    ],
)
def test_half_precision_streams_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path / "model", family, dtype)
    _check_logits(tmp_path, family, dtype)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in ("llama", "qwen2-moe", "qwen3-moe", "deepseek-v3", "gpt-oss")),
        # its router weighs experts in float32
        ("mixtral", torch.bfloat16),
    ],
)
def test_watching_a_block_changes_nothing(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path / "model", family, dtype)
    skeleton, plain = _stream(tmp_path / "plain", tmp_path / "model")
    (tmp_path / "watched").mkdir()
    watched = Stream(skeleton, plain.batches, tmp_path / "watched")
    with skeleton:
        for block in skeleton.blocks:
            taps = Taps(skeleton, block, ["gram"])
            with skeleton.filled(block):
                plain.advance(lambda batch: None)
                with taps.watching():
                    watched.advance(taps.begin)
            assert taps.results()
        for number, batch in enumerate(plain.batches):
            valid = batch.stacks[0].valid
            assert torch.equal(plain.logits(number)[valid], watched.logits(number)[valid])


def test_only_one_block_has_weights(tmp_path: Path) -> None:
    save(tmp_path / "model", "llama")
    skeleton, stream = _stream(tmp_path / "spool", tmp_path / "model")
    with skeleton:
        for block in skeleton.blocks:
            with skeleton.filled(block):
                filled = [each for each in skeleton.blocks if not any(p.is_meta for p in each.module.parameters())]
                assert filled == [block]
                stream.advance(lambda batch: None)
        assert all(p.is_meta for each in skeleton.blocks for p in each.module.parameters())


def test_the_head_stays_empty_unless_it_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "model", "llama")
    with Skeleton(open_checkpoint(str(tmp_path / "model"))) as skeleton:
        skeleton.fill_outside()
        assert skeleton.model.lm_head.weight.is_meta
        assert not skeleton.model.model.embed_tokens.weight.is_meta
        assert not skeleton.model.model.norm.weight.is_meta
    save(tmp_path / "tied", "llama-tied")
    with Skeleton(open_checkpoint(str(tmp_path / "tied"))) as skeleton:
        skeleton.fill_outside()
        assert not skeleton.model.model.embed_tokens.weight.is_meta


def test_the_spool_holds_no_padding(tmp_path: Path) -> None:
    save(tmp_path / "model", "llama")
    skeleton, stream = _stream(tmp_path / "spool", tmp_path / "model")
    with skeleton:
        _run(skeleton, stream)
    for file in (tmp_path / "spool").iterdir():
        assert file.stat().st_size == sum(LENGTHS) * 32 * 4


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_stream_continues_from_its_state(family: str, tmp_path: Path) -> None:
    save(tmp_path / "model", family)
    skeleton, stream = _stream(tmp_path / "whole", tmp_path / "model")
    with skeleton:
        _run(skeleton, stream)
        expected = [stream.logits(number) for number in range(len(stream.batches))]
    skeleton, stream = _stream(tmp_path / "cut", tmp_path / "model")
    with skeleton:
        for block in skeleton.blocks[:2]:
            with skeleton.filled(block):
                stream.advance(lambda batch: None)
    state = StreamState.from_json(stream.state.to_json())
    skeleton, stream = _stream(tmp_path / "cut", tmp_path / "model", state=state)
    with skeleton:
        _run(skeleton, stream)
        for number, own in enumerate(expected):
            assert torch.equal(stream.logits(number), own)


def _counting(shared: dict[str, float], index: int) -> float:
    shared["calls"] = shared.get("calls", 0) + 1
    return shared["calls"]


def _using_up(shared: dict[str, float], index: int) -> float:
    if index == 0:
        shared["left"] = 1.0
    return shared.pop("left") if index == 1 else 0.0


@pytest.mark.parametrize(
    ("leak", "reason"), [(_counting, "computes something else"), (_using_up, "fails when it runs by itself")]
)
def test_work_between_blocks_is_found_out(
    leak: Callable[[dict[str, float], int], float], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: dict[str, float] = {}

    class Layer(transformers.models.llama.modeling_llama.LlamaDecoderLayer):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return super().forward(hidden_states + leak(shared, self.self_attn.layer_idx), **kwargs)

    class Leaking(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.__class__ = Layer

    save(tmp_path / "model", "llama")
    monkeypatch.setattr(internals, "_model_class", lambda config: Leaking)
    with Skeleton(open_checkpoint(str(tmp_path / "model"))) as skeleton:
        skeleton.fill_outside()
        with pytest.raises(UnsupportedError, match=f"Leaking does work between its blocks: .*{reason}"):
            check_streamable(skeleton, _probe(1))


def test_keys_that_blocks_share_are_found_out(tmp_path: Path) -> None:
    """The last blocks of Gemma 3n attend to keys and values that an earlier block left in a dictionary."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=4,
    )
    transformers.Gemma3nForCausalLM(config).save_pretrained(tmp_path / "model")
    with Skeleton(open_checkpoint(str(tmp_path / "model"))) as skeleton:
        skeleton.fill_outside()
        with pytest.raises(UnsupportedError, match=r"Gemma3nForCausalLM"):
            check_streamable(skeleton, _probe(1))


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # made before, since transformers itself imports the module that is taken away
    config = transformers.LlamaConfig()
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    with pytest.raises(UnsupportedError, match=r"^calibrating needs transformers 5\.2 or newer, installed is"):
        internals.build_skeleton(config, torch.float32)


def test_a_model_without_a_stack_is_refused(tmp_path: Path) -> None:
    config = transformers.AlbertConfig(
        vocab_size=VOCAB, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    transformers.AlbertForMaskedLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="has no stack of blocks"):
        Skeleton(open_checkpoint(str(tmp_path / "model")))


def _damaged(folder: Path, change: Any) -> Path:
    save(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_damaged_models_are_refused(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def check(folder: Path, kind: type[Exception], message: str) -> None:
        with Skeleton(open_checkpoint(str(folder))) as skeleton:
            skeleton.fill_outside()
            with pytest.raises(kind, match=message):
                check_streamable(skeleton, _probe(1))

    missing = _damaged(tmp_path / "missing", lambda tensors: tensors.pop(name))
    check(missing, CheckpointError, r"model.layers.1.mlp.up_proj.weight is missing")
    shape = _damaged(tmp_path / "shape", lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    check(shape, CheckpointError, r"has shape \[3, 5\], config.json asks for \[48, 32\]")
    nan = _damaged(tmp_path / "nan", lambda tensors: tensors[name].fill_(float("nan")))
    check(nan, NonFiniteError, r"model.layers.1 gives NaN or infinity")


def test_stacks_of_a_batch_can_be_told_apart_by_their_shape() -> None:
    tokens = [Tokens(tuple(range(count)), (True,) * count) for count in (5, 3)]
    (batch,) = make_batches([Sample((own, other), "here") for own, other in (tokens, tokens[::-1])], 10, 0)
    encoder, decoder = batch.stacks
    assert encoder.ids.shape != decoder.ids.shape
    assert [padded.valid.sum(1).tolist() for padded in batch.stacks] == [[5, 3], [3, 5]]
    assert sorted(batch.inputs()) == ["attention_mask", "decoder_attention_mask", "decoder_input_ids", "input_ids"]
