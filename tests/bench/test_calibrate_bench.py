import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.calibrate import large, peer, regmean
from benchmarks.calibrate.__main__ import main
from benchmarks.calibrate.memory import Shape, make_random
from benchmarks.calibrate.reference import inputs_of
from benchmarks.merge.measure import Usage
from merganser.checkpoint import open_checkpoint
from tests.evaluation.tiny import make_model

THEIRS = """
from fusion_bench.method import BaseAlgorithm
from fusion_bench.mixins import SimpleProfilerMixin, auto_register_config
from fusion_bench.modelpool import BaseModelPool
from .utils import mean

def regmean_merging(models, trainers, exclude, examples, ratio):
    batches = [trainer._prepare_inputs(each) for trainer in trainers for each in trainer.get_train_dataloader()]
    return {"weight": mean(models) * ratio, "examples": examples, "ids": [each["input_ids"] for each in batches]}

@auto_register_config
class RegMeanAlgorithm(SimpleProfilerMixin, BaseAlgorithm):
    pass
"""


def test_calls_the_function_of_the_other(tmp_path):
    folder = tmp_path / "fusion_bench" / "method" / "regmean"
    folder.mkdir(parents=True)
    (folder / "regmean.py").write_text(THEIRS)
    (folder / "utils.py").write_text("def mean(values):\n    return sum(values) / len(values)\n")
    merge = peer.load(tmp_path)
    assert not [name for name in sys.modules if name.startswith("fusion_bench")]
    data = [peer.Batches([torch.ones(2, 3), torch.zeros(1, 3)]), peer.Batches([torch.ones(1, 3)])]
    found = merge([1.0, 3.0], data, [], [own.examples for own in data], 0.5)
    assert (found["weight"], found["examples"]) == (1.0, [3, 1])
    assert [len(ids) for ids in found["ids"]] == [2, 1, 1]


def test_the_reference_takes_the_inputs_of_every_matrix():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
    )
    model = LlamaForCausalLM(config).double()
    batches = [torch.randint(40, (2, 5)), torch.randint(40, (1, 5))]
    found = inputs_of(model, batches)
    assert len(found) == 14
    assert not any(module._forward_hooks for module in model.modules())
    rows = torch.cat(
        [model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).flatten(0, 1) for ids in batches]
    )
    gram, weight = found["model.layers.0.self_attn.k_proj.weight"]
    torch.testing.assert_close(gram, rows.T @ rows / 15)
    assert torch.equal(weight, model.model.layers[0].self_attn.k_proj.weight)


def test_errors_are_measured_by_the_way_from_the_base(tmp_path):
    base, goal = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}, {"a": torch.eye(2) * 3, "b": torch.ones(3)}
    own = {"a": goal["a"] + torch.eye(2) * 0.3, "b": goal["b"] + 0.5}
    for name, tensors in {"base": base, "goal": goal, "own": own}.items():
        save_file(tensors, tmp_path / name)
    found = regmean.error(tmp_path / "own", tmp_path / "goal", tmp_path / "base")
    assert found["error"] == pytest.approx(((0.18 + 0.75) / (18 + 3)) ** 0.5)
    assert found["worst_error"] == pytest.approx(0.5)


def test_a_model_is_shortened(tmp_path):
    whole = make_model(tmp_path / "whole", 0)
    made = open_checkpoint(str(regmean.shortened(whole, 1, tmp_path / "made")))
    assert {name for name in made.tensors if ".layers." in name} == {
        name for name in open_checkpoint(str(whole)).tensors if ".layers.0." in name
    }
    assert made.config["num_hidden_layers"] == 1
    assert "lm_head.weight" in made.tensors or "model.embed_tokens.weight" in made.tensors


def test_the_random_model_has_the_size_that_is_said(tmp_path):
    like = make_model(tmp_path / "like", 0)
    shape = Shape(width=64, inner=96, blocks=3, vocabulary=50)
    opened = open_checkpoint(str(make_random(shape, like, tmp_path / "made")))
    assert sum(own.numel for own in opened.tensors.values()) == shape.parameters + (2 * shape.blocks + 1) * shape.width
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_key_value_heads"]) == (3, 1)
    whole = Shape()
    assert 1 / 32 < whole.block / whole.parameters < 1 / 29


def test_what_all_blocks_take_follows_from_a_few(tmp_path, monkeypatch):
    zoo = tmp_path / "zoo"
    make_model(zoo / "base", 0)
    monkeypatch.setattr(large, "WHOLE", Shape(width=64, inner=96, blocks=32, vocabulary=50))
    ran = []

    def command(arguments, folder):
        (folder / "out").mkdir()
        blocks = json.loads((folder / "model" / "config.json").read_text())["num_hidden_layers"]
        (folder / "out" / "a").write_bytes(bytes(100 * blocks))
        ran.append(arguments)
        return Usage(seconds=9.0, cpu_seconds=10.0 + 2 * blocks, peak_bytes=5000, elsewhere=0, stolen=0)

    monkeypatch.setattr(large, "merganser", command)
    found = large.measure(zoo, tmp_path / "work", None)
    assert [own["peak_bytes"] for own in found["blocks"].values()] == [5000, 5000]
    assert found["of_one_block"] == {"cpu_seconds": 2.0, "seconds": 0.0, "written_bytes": 100.0}
    assert found["estimate_for_all"] == {"cpu_seconds": 74, "written_bytes": 3200}
    assert all(arguments[arguments.index("--sequences") + 1] == "2" for arguments in ran)
    assert not list((tmp_path / "work").iterdir())
    assert 6.5e9 < Shape(width=4096, inner=11_008, blocks=32).parameters < 7e9


def test_what_cannot_be_measured_is_said(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["regmen"])
    assert "regmen: not measured; there are time, memory, large, regmean" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["time"]) == 2
    assert "scripts/demo" in capsys.readouterr().err
    monkeypatch.delenv("MERGANSER_FUSION_BENCH", raising=False)
    (tmp_path / ".cache/merganser/zoo/shipped").mkdir(parents=True)
    assert main(["regmean", "--out", str(tmp_path / "out.json")]) == 2
    assert "no folder with FusionBench is given" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
