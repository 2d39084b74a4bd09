"""LoRA adapters: the arithmetic, against peft's own, and what is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.adapters import open_adapter, patterns
from merganser.adapters.patterns import first_matches
from merganser.checkpoint import Reader, open_checkpoint
from merganser.errors import CheckpointError, NotFoundError, UnsupportedError
from tests.making import HIDDEN, VOCAB, Tensors, llama, llama_config, write_model

Q = "model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "init_lora_weights": True}


def write_adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def pair(module: str = Q, rank: int = 2, out: int = HIDDEN, into: int = HIDDEN) -> Tensors:
    generator = torch.Generator().manual_seed(rank)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, into, generator=generator),
        f"{module}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


def applied(adapter: Path, model: Path) -> Tensors:
    checkpoint = open_checkpoint(str(model))
    found = open_adapter(str(adapter))
    found.check_fits(checkpoint.tensors, "the model")
    with Reader() as reader:
        return {name: found.apply(name, reader.tensor(info), reader) for name, info in checkpoint.tensors.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", llama(0, dtype=torch.bfloat16), llama_config())


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 6 / 2),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"k_proj": 1, "q_proj": 5}}, 5 / 2),
        ({"alpha_pattern": {r"layers\.1.*": 1, r"layers\.0.*q_proj": 4}}, 4 / 2),
        ({"r": 8, "rank_pattern": {"q_proj": 2}}, 6 / 2),
    ],
)
def test_arithmetic(tmp_path: Path, model: Path, config: dict[str, Any], scale: float) -> None:
    tensors = pair()
    found = applied(write_adapter(tmp_path / "adapter", tensors, **config), model)
    before = llama(0, dtype=torch.bfloat16)
    a, b = tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"]
    expected = before[f"{Q}.weight"].double() + scale * (b.double() @ a.double())
    # one product of float32 factors, not rounded to the bfloat16 of the base
    torch.testing.assert_close(found[f"{Q}.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    assert found[f"{Q}.weight"].dtype == torch.float32
    for name, tensor in before.items():
        if name != f"{Q}.weight":
            assert torch.equal(found[name], tensor), name


def test_bin_file(tmp_path: Path, model: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", pair())
    expected = applied(adapter, model)
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    assert torch.equal(applied(adapter, model)[f"{Q}.weight"], expected[f"{Q}.weight"])


CASES = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj", "lm_head"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 12,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {r"layers\.1\.self_attn\.k_proj": 7},
    },
    "embeddings": {"r": 2, "target_modules": ["embed_tokens", "o_proj"]},
    "modules_to_save": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "model", llama(0), llama_config())
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(**CASES[case]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    found = applied(tmp_path / "adapter", folder)
    changed = [name for name in found if not torch.equal(expected[name], llama(0)[name])]
    assert len(changed) >= 3
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_weights_kept_transposed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items() if name != "lm_head.weight"}
    write_model(tmp_path / "model", before, {"model_type": "gpt2"})
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    found = applied(tmp_path / "adapter", tmp_path / "model")
    name = "transformer.h.0.attn.c_attn.weight"
    assert found[name].shape == (8, 24)
    assert not torch.equal(found[name], before[name])
    torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora: it is a DoRA adapter"),
        ({"bias": "lora_only"}, "bias is 'lora_only'.*only 'none' can"),
        ({"lora_bias": True}, "lora_bias: its B matrices have biases"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which also changes the base"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: it repeats layers"),
    ],
)
def test_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"adapter_config.json: {message}"):
        open_adapter(str(write_adapter(tmp_path / "adapter", pair(), **config)))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (pair(), {"r": 3}, f"{Q} has rank 3 by the config, and A has 2 rows"),
        (pair(), {"r": 0}, "r must be a finite number above 0, found 0"),
        (pair(), {"lora_alpha": "x"}, "lora_alpha must be a finite number above 0, found 'x'"),
        (pair(), {"r": float("inf")}, "r must be a finite number above 0, found inf"),
        (pair(), {"r": True}, "r must be a finite number above 0, found True"),
        (pair(), {"r": None}, "r must be a finite number above 0, found None"),
        (pair(), {"r": int("9" * 400)}, "a number of 400 digits"),
        (pair(), {"lora_alpha": float("nan")}, "lora_alpha must be a finite number above 0, found nan"),
        (pair(), {"use_rslora": "false"}, "use_rslora must be true or false, found 'false'"),
        (pair(), {"fan_in_fan_out": 1}, "fan_in_fan_out must be true or false, found 1"),
        (pair(), {"rank_pattern": 3}, "rank_pattern must be a mapping from names of modules to numbers, found 3"),
        (pair(), {"rank_pattern": {"q_proj": "2"}}, r"rank_pattern\.q_proj must be a finite number above 0, found '2'"),
        (pair(), {"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is no regular expression"),
        (pair(), {"alpha_pattern": {"(" * 9_999: 2}}, "alpha_pattern: .* is no regular expression"),
        (pair(), {"alpha_pattern": {"a{99999999999}": 2}}, r"alpha_pattern: 'a\{99999999999\}' is no regular"),
        ({f"{Q}.lora_A.weight": torch.zeros(2, 4)}, {}, f"{Q} has A of LoRA alone; A and B are needed"),
        (
            {f"{Q}.lora_A.weight": torch.zeros(2, 4), f"{Q}.lora_B.weight": torch.zeros(4, 3)},
            {},
            r"A is \[2, 4\] and B is \[4, 3\]; their ranks differ",
        ),
        ({}, {}, "holds no tensors"),
    ],
)
def test_damaged(tmp_path: Path, tensors: Tensors, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_adapter(str(write_adapter(tmp_path / "adapter", tensors, **config)))


KEYS = [
    "q_proj", "proj", "self_attn.q_proj", "model.layers.0.self_attn.q_proj", "", r"layers\.0\..*", r".*\.(q|k)_proj",
    "k_proj|q_proj", r"\d+\.self_attn\.q_proj", "x)|(.*", "^model.*", "model.layers.[0-3].self_attn.q_proj",
    r"(?!model).*", "layers.0", "Q_PROJ",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_patterns_are_looked_up_as_peft_does(key: str) -> None:
    def looked_up(keys: list[str], module: str) -> str:
        # what peft.utils.other.get_pattern_key does
        return next((key for key in keys if re.match(rf"(.*\.)?({key})$", module)), module)

    modules = [Q, "lm_head", "model.layers.10.self_attn.q_proj", "q_proj", "k_proj", "model.embed_tokens"]
    for keys in ([key], ["k_proj", key, "q_proj"], [key, r"\w+"]):
        expected = [looked_up(keys, module) for module in modules]
        found = first_matches(keys, modules)
        assert [module if i is None else keys[i] for i, module in zip(found, modules, strict=True)] == expected


@pytest.mark.parametrize("key", ["(a+)+x", "(a|a)*x", "(.*)*x", "a?" * 30 + "a" * 30 + "x", "(.*.*.*.*.*.*.*.*)x"])
@pytest.mark.parametrize("which", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_take_forever(key: str, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.3)
    adapter = write_adapter(tmp_path / "adapter", pair("a" * 200), **{which: {key: 2}})
    with pytest.raises(
        CheckpointError, match=rf"json: {which}: matching the keys with 1 modules takes more than 0\.3 s"
    ):
        open_adapter(str(adapter))


def test_many_keys_are_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, modules = [f"layers.{i}.q_proj" for i in range(300)], [f"model.layers.{i}.q_proj" for i in range(301)]
    expected = [*range(300), None]
    assert first_matches(keys, modules) == expected
    monkeypatch.setattr(patterns, "_MOST_HERE", 100)
    assert first_matches(keys, modules) == expected


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_pipes(name: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", pair())
    (adapter / ("adapter_model.safetensors" if "model" in name else name)).unlink()
    os.mkfifo(adapter / name)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read: is a named pipe"):
        open_adapter(str(adapter))


def test_unknown_tensor(tmp_path: Path) -> None:
    tensors = pair() | {f"{Q}.lora_magnitude_vector": torch.ones(4)}
    with pytest.raises(UnsupportedError, match=r"lora_magnitude_vector' is neither A nor B"):
        open_adapter(str(write_adapter(tmp_path / "adapter", tensors)))


def test_missing(tmp_path: Path, model: Path) -> None:
    with pytest.raises(NotFoundError, match="adapter 'org/name' not found"):
        open_adapter("org/name")
    with pytest.raises(NotFoundError, match=r"model: no adapter_config\.json"):
        open_adapter(str(model))
    adapter = write_adapter(tmp_path / "adapter", pair())
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"no adapter_model\.safetensors and no adapter_model\.bin"):
        open_adapter(str(adapter))


def test_another_models_adapter(tmp_path: Path, model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    wrong_name = open_adapter(str(write_adapter(tmp_path / "a", pair("model.layers.9.mlp.up_proj"))))
    with pytest.raises(CheckpointError, match=r"changes model\.layers\.9\.mlp\.up_proj\.weight, not found in MODEL;"):
        wrong_name.check_fits(checkpoint.tensors, "MODEL")
    wrong_shape = open_adapter(str(write_adapter(tmp_path / "b", pair(out=99))))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is \[99, 16\] here and \[16, 16\] in MODEL"):
        wrong_shape.check_fits(checkpoint.tensors, "MODEL")
    tied = {name: info for name, info in checkpoint.tensors.items() if name != "lm_head.weight"}
    head = open_adapter(str(write_adapter(tmp_path / "c", pair("lm_head", out=VOCAB))))
    with pytest.raises(CheckpointError, match=r"changes lm_head\.weight, not found in MODEL; it is tied"):
        head.check_fits(tied, "MODEL")
