"""JSON that others wrote, with anything in place of anything: a command ends well, or with a message, and never otherwise."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merganser.adapters import open_adapter
from merganser.errors import MergeError
from merganser.evaluation.scoring.tasks import load_tasks
from merganser.inference.sources import open_source
from tests.cli.tiny import recipe, run, state, write
from tests.report.making import evaluation, write_evaluation

Path_ = tuple[str | int, ...]

# Keys of config.json that something reads, whether the config has them or not.
KEYS = [
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "depth",
    "decoder_layers",
    "encoder_layers",
    "model_type",
    "architectures",
    "vocab_size",
    "text_config",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
    "quantization_config",
    "compression_config",
    "quantization",
    "is_encoder_decoder",
    "num_nextn_predict_layers",
    "sliding_window_pattern",
    "full_attention_interval",
    "global_attn_every_n_layers",
    "max_window_layers",
    "use_sliding_window",
    "sliding_window",
    "layer_types",
    "attention_types",
    "block_types",
    "layers_block_type",
    "attn_layer_period",
    "attn_layer_offset",
    "decoder_sparse_step",
    "mlp_only_layers",
    "first_k_dense_replace",
    "moe_layer_freq",
    "no_rope_layers",
    "no_rope_layer_interval",
    "hybrid_override_pattern",
    "rope_scaling",
    "rope_theta",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "transformers_weights",
    "chat_template",
    "auto_map",
]
WORDS = [
    "", "x", "../x", "/etc/passwd", "\ud800", "a\0b", "\x1b[2J", "model.safetensors", "llama", "gemma2", "qwen3_next", "gpt_neo",
    "llama4_text", "jamba", "LlamaForCausalLM", "float32", "n" * 300,
]  # fmt: skip
NUMBERS = [0, -1, 1, 2, 3, 2**31, 2**63, 10**19, -(10**19), 0.5, 1e308, float("inf"), float("-inf"), float("nan")]

scalars = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.text(max_size=3))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from([*KEYS, *WORDS, "name", "template"]), inner, max_size=3),
    ),
    max_leaves=6,
)


def places(value: Any, here: Path_ = ()) -> Iterator[Path_]:
    """Yield where a JSON value has parts, itself first."""
    yield here
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*here, key))


@st.composite
def damaged(draw: st.DrawFn, original: Any, keys: list[str]) -> Any:
    """Put something else into up to three places, or take something out."""
    value = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        if keys and isinstance(value, dict) and draw(st.booleans()):
            value[draw(st.sampled_from(keys))] = draw(values)
            continue
        *above, last = draw(st.sampled_from([*places(value)])) or (None,)
        if last is None:
            value = draw(values)
            continue
        holder = value
        for key in above:
            holder = holder[key]
        if draw(st.booleans()):
            holder[last] = draw(values)
        else:
            del holder[last]
    return value


@contextmanager
def written(file: Path, value: Any) -> Iterator[None]:
    """Hold something else in a file for a while."""
    before = file.read_bytes() if file.exists() else None
    file.write_text(json.dumps(value))
    try:
        yield
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models, a merge of them with sidecars, an adapter, an evaluation, in the current folder."""
    home = tmp_path_factory.mktemp("wrong")
    before = Path.cwd()
    os.chdir(home)
    base = state(0, dtype=torch.float32)
    for seed, name in enumerate("abc"):
        write(home / name, {key: (tensor + 0.01 * seed).bfloat16() for key, tensor in base.items()})
    (home / "a" / "1_Pooling").mkdir()
    (home / "a" / "1_Pooling" / "config.json").write_text("{}")
    models = [{"model": "b"}, {"model": "c"}]
    recipe(home / "emr.yaml", {"merge_method": "emr", "base_model": "a", "models": models})
    recipe(home / "auto.yaml", {"merge_method": "ties", "base_model": "a", "models": models, "chat_template": "auto",
                                "parameters": {"weight": 1.0, "density": 0.5}})  # fmt: skip
    sources = [{"model": "a", "layer_range": [0, 1]}], [{"model": "b", "layer_range": [1, 2]}]
    recipe(home / "slices.yaml", {"merge_method": "passthrough", "slices": [{"sources": each} for each in sources]})
    assert run("merge", "emr.yaml", "out", "-q").code == 0
    (home / "adapter").mkdir()
    factors = {"A": torch.ones(2, 8), "B": torch.ones(8, 2)}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format(key): value for key, value in factors.items()}, home / "adapter" / "adapter_model.safetensors"
    )
    write_evaluation(home / "eval.json", evaluation(home / "out"))
    yield home
    os.chdir(before)


def ended(*arguments: str) -> None:
    """A command ends with 0, or with 2 and one message."""
    found = run(*arguments)
    assert found.code in (0, 2), (arguments, found.err)
    assert "Traceback" not in found.err
    assert found.code == 0 or found.err.splitlines()[-1].startswith(("error: ", "       ")), found.err


def in_message(act: Callable[[], object]) -> None:
    with suppress(MergeError):
        act()


many = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

CONFIG = json.loads(json.dumps({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 32,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rope_scaling": {"type": "linear", "factor": 2.0},
}))  # fmt: skip


@many
@given(value=damaged(CONFIG, KEYS))
@example(value=CONFIG | {"model_type": "gpt_neo", "attention_types": [[["global", "local"], 2_000_000_000]]})
@example(value=CONFIG | {"num_hidden_layers": 2**62, "model_type": "gemma2"})
def test_configs(value: Any, folder: Path) -> None:
    with written(folder / "a" / "config.json", value):
        for verb in (["inspect", "a"], ["plan", "auto.yaml"], ["plan", "slices.yaml"], ["diff", "a", "b"]):
            ended(*verb)


TOKENIZER = {"chat_template": [{"name": "default", "template": "x"}], "added_tokens_decoder": {"0": {"content": "x"}}}


@many
@given(
    value=damaged(TOKENIZER, ["chat_template", "eos_token"]),
    name=st.sampled_from(["tokenizer_config", "chat_template"]),
)
def test_tokenizers(value: Any, name: str, folder: Path) -> None:
    with written(folder / "a" / f"{name}.json", value):
        ended("plan", "auto.yaml")
        ended("inspect", "a")


VOCABULARY = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
    "added_tokens": [{"id": 2, "content": "x"}],
}


@many
@given(
    value=damaged(VOCABULARY, ["added_tokens", "model"]), name=st.sampled_from(["tokenizer", "vocab", "added_tokens"])
)
def test_vocabularies(value: Any, name: str, folder: Path) -> None:
    with written(folder / "a" / f"{name}.json", value):
        ended("plan", "auto.yaml")


@many
@given(value=damaged({"eos_token_id": [1, 2], "bos_token_id": 0}, ["eos_token_id", "pad_token_id"]))
def test_generation_configs(value: Any, folder: Path) -> None:
    with written(folder / "a" / "generation_config.json", value):
        ended("plan", "auto.yaml")


@many
@given(value=damaged([{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling", "type": "x"}], []))
def test_modules(value: Any, folder: Path) -> None:
    with written(folder / "a" / "modules.json", value):
        ended("plan", "auto.yaml")


@many
@given(data=st.data())
def test_indexes(data: st.DataObject, folder: Path) -> None:
    weight_map = dict.fromkeys(state(0), "model.safetensors")
    value = data.draw(damaged({"metadata": {"total_size": 1}, "weight_map": weight_map}, ["weight_map"]))
    with written(folder / "a" / "model.safetensors.index.json", value):
        ended("inspect", "a")
        ended("inspect", "a/model.safetensors.index.json")


@many
@given(data=st.data())
def test_records(data: st.DataObject, folder: Path) -> None:
    value = data.draw(damaged(json.loads((folder / "out" / "merge.json").read_text()), ["outputs", "sidecars"]))
    with written(folder / "out" / "merge.json", value):
        ended("verify", "out")
        ended("report", "out", "--out", "page.html", "--overwrite")
        ended("restore", "out", "--task", "b", "--out", "restored", "--overwrite", "-q")


@many
@given(data=st.data())
def test_indexes_of_sidecars(data: st.DataObject, folder: Path) -> None:
    file = folder / "out" / "sidecars" / "index.json"
    value = data.draw(damaged(json.loads(file.read_text()), ["tasks", "parameters", "base", "shared"]))
    with written(file, value), ExitStack() as stack:
        in_message(lambda: open_source("out#b", stack))
        with written(folder / "out" / "merge.json", unhashed(folder / "out", file)):
            ended("restore", "out", "--task", "b", "--out", "restored", "--overwrite", "-q")


def unhashed(out: Path, file: Path) -> Any:
    """Return the record of an output with the hash of a file as it is now."""
    import hashlib

    record = json.loads((out / "merge.json").read_text())
    for entry in record["outputs"]:
        if out / entry["file"] == file:
            entry |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    return record


ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "init_lora_weights": True, "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"k_proj": 3}, "use_rslora": False, "base_model_name_or_path": "x", "fan_in_fan_out": False,
}  # fmt: skip


@many
@given(value=damaged(ADAPTER, ["use_dora", "lora_bias", "megatron_config", "target_modules"]))
def test_adapters(value: Any, folder: Path) -> None:
    with written(folder / "adapter" / "adapter_config.json", value):
        in_message(lambda: open_adapter("adapter"))


@many
@given(data=st.data())
def test_evaluations(data: st.DataObject, folder: Path) -> None:
    value = data.draw(damaged(json.loads((folder / "eval.json").read_text()), ["retention", "differences"]))
    with written(folder / "eval.json", value):
        ended("report", "out", "--eval", "eval.json", "--out", "page.html", "--overwrite")


@many
@given(value=damaged({"context": "a", "choices": ["b", "c"], "gold": 1}, ["text"]))
def test_questions(value: Any, folder: Path) -> None:
    with written(folder / "questions.jsonl", value):
        in_message(lambda: load_tasks(["questions.jsonl"]))
