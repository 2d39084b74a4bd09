"""Statistics of gradients: the streamed reverse pass gives what autograd gives on the whole model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merganser
from merganser.calibration.data.batches import Padded, Sample, Tokens, make_batches
from merganser.calibration.forward import stream
from merganser.calibration.forward.skeleton import Skeleton
from merganser.calibration.reverse import backward, check_predicts
from merganser.calibration.reverse import run as reverse_run
from merganser.calibration.reverse.loss import Loss
from merganser.calibration.single import run
from merganser.checkpoint import Reader, open_checkpoint
from merganser.cli import main
from merganser.errors import DataError, NonFiniteError, UnsupportedError
from merganser.statistics import Statistics
from tests.calibration.families import FAMILIES, save
from tests.calibration.literal import gradients_of
from tests.calibration.test_calibrate import _model, _sequences, _Stop, _texts
from tests.evaluation.tiny import text

ALL = ("fisher", "gradient", "absolute_gradient", "sensitivity", "gradient_gram")


def _read(found: Statistics) -> dict[str, Tensor]:
    with Reader() as reader:
        return {name: reader.tensor(info) for name, info in found.sums.items()}


def _pairs(file: Path, count: int = 4) -> tuple[Path, list[dict[str, str]]]:
    pairs = [{"prompt": text(i, 4 + i), "completion": text(50 + i, 7 - i)} for i in range(count)]
    file.write_text("\n".join(map(json.dumps, pairs)))
    return file, pairs


def _translations(model: Path, pairs: list[dict[str, str]]) -> list[dict[str, Tensor]]:
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(model)
    return [
        {
            "input_ids": torch.tensor([encode(pair["prompt"])["input_ids"]]),
            "decoder_input_ids": torch.tensor([[0, *encode(pair["completion"])["input_ids"]]]),
        }
        for pair in pairs
    ]


def _close(found: Tensor, expected: Tensor, where: str) -> None:
    """Compare with what was computed in float64; what rounding is measured by are the largest entries."""
    error = (found.double() - expected).abs().max()
    assert error <= 2e-5 * expected.abs().max() + 1e-30, f"{where}: off by {error} of {expected.abs().max()}"


def _part(name: str, gradients: dict[str, Tensor]) -> Tensor:
    """Return the gradient of a tensor of a checkpoint, by the layouts of Mixtral and DeepSeek, and GPT-NeoX's head."""
    if name in gradients:
        return gradients[name]
    # GPT-NeoX's head has the name of the checkpoint in transformers 5.2, and another one later
    name = {"embed_out.weight": "lm_head.weight"}.get(name, name).replace("block_sparse_moe", "mlp")
    if ".experts." not in name or name in gradients:
        return gradients[name]
    prefix, _, rest = name.partition(".experts.")
    expert, _, kind = rest.partition(".")
    if kind in ("w2.weight", "down_proj.weight"):
        return gradients[f"{prefix}.experts.down_proj"][int(expert)]
    first, second = gradients[f"{prefix}.experts.gate_up_proj"][int(expert)].chunk(2)
    return first if kind in ("w1.weight", "gate_proj.weight") else second


@pytest.mark.parametrize(
    "family", ["llama-tied", "gemma3", "phi3", "gpt2", "gpt-neox", "mixtral", "deepseek-v3", "gpt-oss", "t5"]
)
def test_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model = _model(tmp_path / "model", family)
    if family == "t5":
        data, pairs = _pairs(tmp_path / "data.jsonl", 3)
        sequences = _translations(model, pairs)
    else:
        data = _texts(tmp_path / "data.jsonl", count=3)
        sequences = _sequences(model, data)
    found = merganser.calibrate(model, [data], tmp_path / "out", statistics=["fisher", "gradient"], length=24)
    assert found.statistics == ("count", "fisher", "gradient", "loss")
    assert found.about["without_gradients"] == []
    stored = load_file(model / "model.safetensors")
    # the bias that balances DeepSeek's experts is not a parameter
    assert found.gradients.keys() == {name for name in stored if not name.endswith("e_score_correction_bias")}
    gradients, losses = gradients_of(model, FAMILIES[family][1], sequences)
    sums = _read(found)
    _close(sums["loss"], sum(losses), "loss")
    # of every sequence, in the order of the draw
    _close(sums["losses"].sort().values, torch.stack(losses).sort().values, "losses")
    assert found.losses == tuple(sums["losses"].tolist())
    for name in found.gradients:
        own = [_part(name, each) for each in gradients]
        assert sums[f"fisher/{name}"].shape == stored[name].shape
        _close(sums[f"gradient/{name}"], sum(own), f"{name}, gradient")
        _close(sums[f"fisher/{name}"], sum(each.square() for each in own), f"{name}, squares")


def test_every_statistic_by_its_definition(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = _model(tmp_path / "model")
    data, pairs = _pairs(tmp_path / "data.jsonl")
    found = merganser.calibrate(model, [data], tmp_path / "out", statistics=ALL, tokens="completions")
    encode = AutoTokenizer.from_pretrained(model)
    sequences, counted = [], []
    for pair in pairs:
        whole = encode(pair["prompt"] + pair["completion"], return_offsets_mapping=True)
        sequences.append({"input_ids": torch.tensor([whole["input_ids"]])})
        counted.append(torch.tensor([end > len(pair["prompt"]) for _, end in whole["offset_mapping"]]))
    gradients, losses = gradients_of(model, "LlamaForCausalLM", sequences, counted)
    sums, stored = _read(found), load_file(model / "model.safetensors")
    tokens = sum(int(each[1:].sum()) for each in counted)
    assert sums["predictions"].item() == found.predictions == tokens
    assert found.loss == pytest.approx(float(sum(losses)) / tokens, rel=1e-6)
    for name, weight in stored.items():
        own = [each[name] for each in gradients]
        magnitude = sum(each.abs() for each in own)
        _close(sums[f"absolute_gradient/{name}"], magnitude, name)
        _close(sums[f"sensitivity/{name}"], (weight.double().abs() * magnitude).sum(), name)
        assert found.sensitivity(name) == pytest.approx(sums[f"sensitivity/{name}"].item() / tokens)
    whole = AutoModelForCausalLM.from_pretrained(model).double().eval()
    name = "model.layers.1.mlp.up_proj"
    grams = []

    def receive(_: Any, __: Any, output: Tensor) -> None:
        output.register_hook(lambda g: grams.append(g[0].T @ g[0]))

    whole.get_submodule(name).register_forward_hook(receive)
    for inputs, own in zip(sequences, counted, strict=True):
        scores = torch.log_softmax(whole(**inputs).logits[0, :-1], -1)
        (-scores.gather(1, inputs["input_ids"][0, 1:, None])[own[1:]].sum()).backward()
    _close(sums[f"gradient_gram/{name}.weight"], sum(grams), "gradient_gram")
    matrices = [name for name in stored if name.endswith("proj.weight")]
    assert sorted(name for name, own in found.gradients.items() if "gradient_gram" in own) == sorted(matrices)


def test_bfloat16_is_computed_in_float32(tmp_path: Path) -> None:
    model, data = _model(tmp_path / "model"), _texts(tmp_path / "data.jsonl", count=2)
    half = {name: own.bfloat16() for name, own in load_file(model / "model.safetensors").items()}
    save_file(half, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    found = merganser.calibrate(model, [data], tmp_path / "out", statistics=["fisher"], length=24)
    assert found.about["model"]["dtype"] == "float32"
    gradients, _ = gradients_of(model, "LlamaForCausalLM", _sequences(model, data))
    sums = _read(found)
    for name in half:
        _close(sums[f"fisher/{name}"], sum(each[name].square() for each in gradients), name)


def test_shards_add_up(tmp_path: Path) -> None:
    model = _model(tmp_path / "model", "llama-tied")
    one, two = _texts(tmp_path / "one.jsonl", 1, 2), _texts(tmp_path / "two.jsonl", 2, 3)
    options: dict[str, Any] = {"statistics": ALL, "length": 24}
    whole = merganser.calibrate(model, [one, two], tmp_path / "whole", **options)
    for name, file in (("a", one), ("b", two)):
        merganser.calibrate(model, [file], tmp_path / name, **options)
    added = merganser.add_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "sum")
    found, expected = _read(added), _read(whole)
    assert found.keys() == expected.keys()
    parts = [_read(merganser.statistics.open_statistics(tmp_path / name))["losses"] for name in ("a", "b")]
    assert torch.equal(found.pop("losses"), torch.cat(parts))
    _close(torch.cat(parts).sort().values, expected.pop("losses").sort().values, "losses")
    for name, own in expected.items():
        _close(found[name], own.double(), name)
    merganser.calibrate(model, [one], tmp_path / "sampled", labels="sampled", **options)
    with pytest.raises(DataError, match="have a loss with other labels than those"):
        merganser.add_statistics([tmp_path / "b", tmp_path / "sampled"], tmp_path / "no")


def test_the_size_of_batches_changes_nothing(tmp_path: Path) -> None:
    model, data = _model(tmp_path / "model"), _texts(tmp_path / "data.jsonl", count=3)
    found = [
        merganser.calibrate(model, [data], tmp_path / str(size), statistics=["gradient"], length=24, batch_tokens=size)
        for size in (1, 500)
    ]
    for name, own in _read(found[0]).items():
        assert torch.equal(own, _read(found[1])[name])


def test_sampled_labels_are_those_of_the_model() -> None:
    """Over draws of the model itself, the gradient of the log-likelihood is zero in the mean."""
    ids = torch.tensor([[3, 1, 4, 1]])
    sequence = Padded(ids, torch.ones(1, 4, dtype=torch.bool), torch.tensor([[True, True, False, True]]), 0)
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    total, squares = torch.zeros(1, 4, 6), torch.zeros(1, 4, 6)
    count = 1500
    for seed in range(count):
        (gradient,) = torch.autograd.grad(Loss("sampled", seed).of(logits, sequence), logits)
        total += gradient
        squares += gradient.square()
    share = torch.softmax(logits.detach(), -1)
    chosen = torch.tensor([True, False, True, False])
    assert (total[:, ~chosen] == 0).all()
    assert (total / count).abs().max() < 0.06
    # the Fisher information of a softmax, on its diagonal
    expected = (share * (1 - share))[:, chosen]
    torch.testing.assert_close(squares[:, chosen] / count, expected, atol=0.03, rtol=0)
    again = [Loss("sampled", 7).of(logits, sequence) for _ in range(2)]
    assert torch.equal(again[0], again[1])


def test_sampled_labels_do_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    model = _model(tmp_path / "model")
    one, two = _texts(tmp_path / "one.jsonl", 1, 2), _texts(tmp_path / "two.jsonl", 2, 2)
    options: dict[str, Any] = {"statistics": ["loss"], "length": 24, "labels": "sampled"}
    found = [
        merganser.calibrate(model, files, tmp_path / name, **options)
        for name, files in (("ab", [one, two]), ("ba", [two, one]))
    ]
    assert found[0].loss == found[1].loss
    given = merganser.calibrate(model, [one, two], tmp_path / "data", **{**options, "labels": "data"})
    assert given.loss != found[0].loss
    # without gradients there is but the loss
    assert given.gradients == {}
    assert (tmp_path / "data" / "loss.safetensors").is_file()


@pytest.mark.parametrize(
    ("family", "step", "calls"),
    [("llama", "forward", 7), ("llama", "head", 2), ("llama", "block", 2), ("llama", "block", 13), ("t5", "block", 8)],
)
def test_a_killed_calibration_continues(
    family: str, step: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(tmp_path / "model", family)
    data, _ = _pairs(tmp_path / "data.jsonl")
    options: dict[str, Any] = {"statistics": ("gram", *ALL), "length": 60}
    whole = merganser.calibrate(model, [data], tmp_path / "whole", **options)
    module, name = {
        "forward": (stream, "run_on_text"),
        "head": (reverse_run, "head_backward"),
        "block": (reverse_run, "block_backward"),
    }[step]
    original, seen = getattr(module, name), []

    def counting(*args: Any) -> Any:
        seen.append(args[1] if step != "head" else 0)
        if len(seen) == calls:
            raise _Stop
        return original(*args)

    monkeypatch.setattr(module, name, counting)
    with pytest.raises(_Stop):
        merganser.calibrate(model, [data], tmp_path / "cut", **options)
    stopped = seen[-1]
    found = merganser.calibrate(model, [data], tmp_path / "cut", **options)
    assert seen[calls] == stopped
    assert not list(tmp_path.glob(".cut*"))
    files = sorted(file.name for file in whole.path.iterdir())
    assert sorted(file.name for file in found.path.iterdir()) == files
    for file in files:
        assert (found.path / file).read_bytes() == (whole.path / file).read_bytes()


def test_only_one_block_has_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = _model(tmp_path / "model"), _texts(tmp_path / "data.jsonl", count=2)
    seen: list[tuple[int, list[int]]] = []

    def watching(skeleton: Any, index: int, *rest: Any) -> Any:
        full = [i for i, own in enumerate(skeleton.blocks) if not any(p.is_meta for p in own.module.parameters())]
        seen.append((index, full))
        return backward.block_backward(skeleton, index, *rest)

    monkeypatch.setattr(reverse_run, "block_backward", watching)
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"statistics": ["fisher"], "progress": lambda done, count: told.append((done, count))}
    merganser.calibrate(model, [data], tmp_path / "out", **options)
    assert seen == [(index, [index]) for index in (3, 2, 1, 0) for _ in range(2)]
    assert told == [(done, 9) for done in range(9)]


def test_joined_zeros_are_told_apart(tmp_path: Path) -> None:
    """Two experts' matrices that are joined when they are loaded may hold the same values."""
    model = _model(tmp_path / "model", "mixtral")
    tensors = load_file(model / "model.safetensors")
    prefix = "model.layers.2.block_sparse_moe.experts.1"
    tensors[f"{prefix}.w3.weight"] = tensors[f"{prefix}.w1.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    found = merganser.calibrate(
        model, [_texts(tmp_path / "data.jsonl", count=2)], tmp_path / "out", statistics=["gradient"], length=24
    )
    assert found.about["without_gradients"] == []
    sums = _read(found)
    gradients, _ = gradients_of(model, "MixtralForCausalLM", _sequences(model, tmp_path / "data.jsonl"))
    for name in ("w1", "w3"):
        own = f"{prefix}.{name}.weight"
        _close(sums[f"gradient/{own}"], sum(_part(own, each) for each in gradients), own)


def test_what_has_no_loss_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _texts(tmp_path / "data.jsonl", count=2)
    with pytest.raises(UnsupportedError, match="BertForMaskedLM does not predict the next token, so it has no loss"):
        merganser.calibrate(_model(tmp_path / "bert", "bert"), [data], tmp_path / "out", statistics=["fisher"])
    model = _model(tmp_path / "model")
    with pytest.raises(DataError, match="labels: must be data or sampled, found 'true'"):
        merganser.calibrate(model, [data], tmp_path / "out", statistics=["fisher"], labels="true")
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(DataError, match=r"short.txt: no token that counts follows another one"):
        merganser.calibrate(model, [tmp_path / "short.txt"], tmp_path / "out", statistics=["loss"])
    monkeypatch.setattr(Loss, "of", lambda self, logits, sequence: logits.sum() * math.nan)
    with pytest.raises(NonFiniteError, match=r"data.jsonl:\d: the loss of the model is NaN or infinite for this text"):
        merganser.calibrate(model, [data], tmp_path / "out", statistics=["fisher"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "data.jsonl", "model", "short.txt"]


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    model, data = _model(tmp_path / "model"), _texts(tmp_path / "data.jsonl", count=2)
    found = merganser.calibrate(model, [data], tmp_path / "out", statistics=["fisher"])
    with pytest.raises(DataError, match=r"has no 'gradient'; it has count, fisher, loss. Calibrate again"):
        found.info("gradient", "model.norm.weight")
    with pytest.raises(DataError, match=r"has no entry for tensor 'model.rotary'"):
        found.info("fisher", "model.rotary")
    file = found.path / "statistics.json"
    about = json.loads(file.read_text())
    for missing, message in (
        ("gradients-00002-of-00005.safetensors", "'fisher' of tensor"),
        ("loss.safetensors", "'loss'"),
    ):
        files = [name for name in about["files"] if name != missing]
        file.write_text(json.dumps({**about, "files": files}))
        with pytest.raises(DataError, match=f"{message}.* is in none of its files"):
            merganser.statistics.open_statistics(found.path)


def test_every_name_is_known() -> None:
    assert {*ALL, "loss"} <= set(run.STATISTICS)


def test_the_command_tells_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = _model(tmp_path / "model"), _texts(tmp_path / "data.jsonl", count=2)
    options = ["--statistics", "fisher", "--labels", "sampled", "--length", "24", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", str(model), "--data", str(data), *options])
    assert not ended.value.code
    told = capsys.readouterr().out
    found = merganser.statistics.open_statistics(tmp_path / "out")
    assert found.about["labels"] == "sampled"
    assert f"loss {found.loss:.4f} nats per token, over {found.predictions} tokens" in told
    assert told.startswith("count, fisher, loss · 39 tensors · 2 sequences · ")
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", str(model), "--data", str(data), "--statistics", "fischer", "--out", str(tmp_path / "b")])
    assert ended.value.code == 2
    assert "unknown statistic 'fischer'. Did you mean 'fisher'?" in capsys.readouterr().err


def test_every_sequence_of_a_batch_may_have_the_predicted_tokens(tmp_path: Path) -> None:
    first_alone = Sample((Tokens((3, 4, 5, 6), (True, False, False, False)),), "long")
    both = Sample((Tokens((3, 4), (False, True)),), "short")
    with Skeleton(open_checkpoint(str(save(tmp_path / "model", "llama")))) as skeleton:
        check_predicts(skeleton, make_batches([first_alone, both], 2048, 0))
        with pytest.raises(DataError, match="long: no token that counts follows another one"):
            check_predicts(skeleton, make_batches([first_alone, first_alone], 2048, 0))
