"""Models with adapters: the arithmetic, against peft's own, and what is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.adapters import open_adapter, open_model, patterns, with_adapter
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
    checkpoint = open_model(str(model), str(adapter))
    with Reader() as reader:
        return {name: reader.tensor(info) for name, info in checkpoint.tensors.items()}


def fit(adapter: Path, model: Path, name: str = "MODEL") -> None:
    with_adapter(open_checkpoint(str(model)), open_adapter(str(adapter)), name)


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


def randomised(model: Any, seed: int = 3) -> Any:
    """Give every trained parameter random values; lengths and factors of IA3 stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                near_one = "magnitude" in name or "ia3" in name
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise if near_one else noise)
    return model


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LoraConfig", {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "patterns": (
        "LoraConfig",
        {
            "r": 4,
            "lora_alpha": 12,
            "use_rslora": True,
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"k_proj": 3},
            "alpha_pattern": {r"layers\.1\.self_attn\.k_proj": 7},
        },
    ),
    "embeddings": ("LoraConfig", {"r": 2, "target_modules": ["embed_tokens", "o_proj"]}),
    "modules_to_save": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "lengths": ("LoraConfig", {"r": 2, "use_dora": True, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "lengths of embeddings": ("LoraConfig", {"r": 2, "use_dora": True, "target_modules": ["embed_tokens", "o_proj"]}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "model", llama(0), llama_config())
    kind, config = CASES[case]
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), getattr(peft, kind)(**config))
    randomised(model).save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    found = applied(tmp_path / "adapter", folder)
    changed = [name for name in found if not torch.equal(expected[name], llama(0)[name])]
    assert len(changed) >= 3
    assert sorted(found) == sorted(llama(0))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_biases(tmp_path: Path) -> None:
    """Those of the base that were trained, and those that IA3 multiplies."""
    import peft
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    base = randomised(Qwen2ForCausalLM(config), 5)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    folder = write_model(tmp_path / "model", before, config.to_dict())
    for i, trained in enumerate(
        [
            peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
            peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        ]
    ):
        own = Qwen2ForCausalLM(config)
        own.load_state_dict(before)
        model = randomised(peft.get_peft_model(own, trained))
        model.save_pretrained(tmp_path / f"adapter{i}")
        expected = model.merge_and_unload().state_dict()
        found = applied(tmp_path / f"adapter{i}", folder)
        assert any("bias" in name and not torch.equal(found[name], before[name]) for name in found)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", ["model.embed_tokens", "lm_head", "both"])
def test_tied(tmp_path: Path, tied: str) -> None:
    """The model with its adapter gives the logits that it gave in training, so its head is one of its own."""
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = write_model(tmp_path / "model", llama(0, head=False), llama_config(tied=True))
    targets = ["embed_tokens", "lm_head"] if tied == "both" else [tied.rpartition(".")[2]]
    config = peft.LoraConfig(r=2, target_modules=[*targets, "q_proj"])
    model = randomised(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(8)[None]
    expected = model(tokens).logits
    checkpoint = open_model(str(folder), str(tmp_path / "adapter"))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert any("tied" in note for note in checkpoint.notes)
    own = LlamaForCausalLM(LlamaConfig(**checkpoint.config)).eval()
    own.load_state_dict(applied(tmp_path / "adapter", folder))
    torch.testing.assert_close(own(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_5_moe"])
def test_packed_experts(tmp_path: Path, family: str) -> None:
    import peft

    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 16, "hidden_size": 12, "intermediate_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_local_experts": 3, "num_experts": 3,
        "num_experts_per_tok": 2, "shared_expert_intermediate_size": 8, "layer_types": ["full_attention"],
    }  # fmt: skip
    kind = {"gpt_oss": "GptOssConfig", "qwen3_5_moe": "Qwen3_5MoeTextConfig"}[family]
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers has no {kind}")
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes))
    randomised(base, 7)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    folder = write_model(tmp_path / "model", before, {"model_type": family})
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    model = randomised(peft.get_peft_model(base, config))
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    found = applied(tmp_path / "adapter", folder)
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert len(changed) == 3
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lengths", [False, True])
def test_weights_kept_transposed(tmp_path: Path, lengths: bool) -> None:
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items() if name != "lm_head.weight"}
    write_model(tmp_path / "model", before, {"model_type": "gpt2"})
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=lengths)
    model = randomised(peft.get_peft_model(base, config))
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
        ({"bias": "lora_only"}, "bias is 'lora_only': peft does not save all"),
        ({"lora_bias": True}, "lora_bias: its B matrices have biases"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; adapters of LORA and IA3"),
        ({"peft_type": None}, "peft_type is None; adapters of LORA and IA3"),
        ({"use_qora": True}, "'use_qora' is True: this setting is not known here.*Did you mean 'use_dora'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: it replaces single rows"),
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
        (pair(), {"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is not a regular expression"),
        (pair(), {"alpha_pattern": {"(" * 9_999: 2}}, "alpha_pattern: .* is not a regular expression"),
        (pair(), {"alpha_pattern": {"a{99999999999}": 2}}, r"alpha_pattern: 'a\{99999999999\}' is not a regular"),
        ({f"{Q}.lora_A.weight": torch.zeros(2, 4)}, {}, f"{Q} has A of LoRA alone; A and B are needed"),
        (
            {f"{Q}.lora_A.weight": torch.zeros(2, 4), f"{Q}.lora_B.weight": torch.zeros(4, 3)},
            {},
            r"A is \[2, 4\] and B is \[4, 3\]; their ranks differ",
        ),
        ({}, {}, "holds no tensors"),
        (pair() | {f"{Q}.lora_A": torch.zeros(2, HIDDEN)}, {}, f"{Q} has A of LoRA twice"),
        (pair(), {"use_dora": True}, f"{Q} has no lora_magnitude_vector, and use_dora is true"),
        (
            pair() | {f"{Q}.lora_magnitude_vector": torch.ones(HIDDEN)},
            {},
            "lora_magnitude_vector, and use_dora is false",
        ),
        (
            pair() | {f"{Q}.lora_magnitude_vector": torch.ones(3)},
            {"use_dora": True},
            f"{Q} has 3 lengths and {HIDDEN} outputs",
        ),
        (pair() | {f"{Q}.ia3_l": torch.ones(HIDDEN, 1)}, {}, f"{Q} has tensors of IA3, and by its config .* is LoRA"),
        (pair(), {"peft_type": "IA3"}, f"{Q} has tensors of LoRA, and by its config the adapter is IA3"),
        (pair(rank=0), {}, "empty, as saved by a run that was not gathered"),
        (pair(), {"target_parameters": "x"}, "target_parameters must be a list of names of parameters, found 'x'"),
        ({"a.weight": torch.ones(2), "a.base_layer.weight": torch.ones(2)}, {}, "holds a.weight twice"),
        ({"a.weight": torch.ones(2, dtype=torch.int8)}, {}, "is int8; float values are needed"),
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
    tensors = pair() | {f"{Q}.lora_E": torch.ones(4)}
    with pytest.raises(UnsupportedError, match=r"lora_E' is neither A nor B"):
        open_adapter(str(write_adapter(tmp_path / "adapter", tensors)))


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", pair())
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": os.system}, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read without running code from it"):
        open_adapter(str(adapter))


def test_missing(tmp_path: Path, model: Path) -> None:
    with pytest.raises(NotFoundError, match=r"adapter '\./org/name' not found"):
        open_adapter("./org/name")
    with pytest.raises(NotFoundError, match=r"model: no adapter_config\.json"):
        open_adapter(str(model))
    adapter = write_adapter(tmp_path / "adapter", pair())
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"no adapter_model\.safetensors and no adapter_model\.bin"):
        open_adapter(str(adapter))


def test_another_models_adapter(tmp_path: Path, model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"changes model\.layers\.9\.mlp\.up_proj\.weight, not found in MODEL;"):
        fit(write_adapter(tmp_path / "a", pair("model.layers.9.mlp.up_proj")), model)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is \[99, 16\] here and \[16, 16\] in MODEL"):
        fit(write_adapter(tmp_path / "b", pair(out=99)), model)
    resized = write_adapter(tmp_path / "c", {"model.embed_tokens.weight": torch.ones(VOCAB + 8, HIDDEN)})
    with pytest.raises(CheckpointError, match=r"\[40, 16\] here and \[32, 16\] in MODEL; its vocabulary was resized"):
        fit(resized, model)
    wrong = write_adapter(tmp_path / "d", {f"{Q}.ia3_l": torch.ones(HIDDEN + 1, 1)}, peft_type="IA3")
    with pytest.raises(CheckpointError, match="q_proj has 17 factors of outputs, and its weight is"):
        fit(wrong, model)
    parameters = write_adapter(tmp_path / "e", pair("model.layers.0.mlp.experts"), target_parameters=["experts.up"])
    with pytest.raises(
        UnsupportedError, match=r"target_parameters: model\.layers\.0\.mlp\.experts\.up is not in MODEL"
    ):
        fit(parameters, model)


def test_names_that_begin_otherwise(tmp_path: Path, model: Path) -> None:
    found = open_model(str(model), str(write_adapter(tmp_path / "a", pair(Q.removeprefix("model.")))))
    assert found.tensors[f"{Q}.weight"].stored
    assert any("begin with 'nothing' where those of" in note for note in found.notes)


@pytest.mark.parametrize(
    ("named", "said"), [("org/model", False), ("Org/MODEL", False), (None, False), ("org/another", True)]
)
def test_base_that_the_config_names(tmp_path: Path, model: Path, named: str | None, said: bool) -> None:
    adapter = write_adapter(tmp_path / "a", pair(), base_model_name_or_path=named)
    notes = open_model(str(model), str(adapter)).notes
    assert [f"names {named} as its base" in note for note in notes] == [True] * said


def test_any_range_of_rows(tmp_path: Path, model: Path) -> None:
    """Whatever is read, and by how many threads, the values are those of the whole."""
    info = open_model(str(model), str(write_adapter(tmp_path / "a", pair()))).tensors[f"{Q}.weight"]
    with Reader() as reader:
        whole = reader.tensor(info).numpy().tobytes()
        for start in range(0, len(whole), 96):
            buffer = bytearray(min(160, len(whole) - start))
            reader.read_into(info, start, memoryview(buffer))
            close = torch.frombuffer(buffer, dtype=torch.float32)
            expected = torch.frombuffer(bytearray(whole[start : start + len(buffer)]), dtype=torch.float32)
            torch.testing.assert_close(close, expected)
