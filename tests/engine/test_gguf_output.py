"""`gguf`: outputs that are GGUF files, read back by the package of llama.cpp's authors and by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

from merganser.checkpoint import open_checkpoint
from merganser.engine.in_memory.run import merge_to_state_dict
from merganser.engine.merge import merge, plan
from merganser.errors import MergeError
from merganser.recipe import load_recipes
from merganser.record import verify
from tests.adapters.test_apply import Q, pair, write_adapter
from tests.checkpoint.gguf.making import written
from tests.engine.interrupting import in_a_process, merge_and_die
from tests.making import Tensors, llama, llama_config, make_recipe, read_files, read_json, read_model, write_model

pytestmark = pytest.mark.usefixtures("small_blocks")

NUMBERS: dict[str, int | float] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 24,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
    "vocab_size": 32,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    **{f"self_attn.{own}_proj": f"attn_{own}" for own in "qkv"},
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}


def converted(tensors: Tensors, *, permuted: bool = True, plus_one: bool = False) -> Tensors:
    """What llama.cpp's converter makes of a checkpoint: other names, rows in another order, stacks of experts."""
    found: Tensors = {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        module, _, kind = (rest if layer.isdigit() else name).rpartition(".")
        prefix = f"blk.{layer}." if layer.isdigit() else ""
        if ".experts." in name:
            stacks.setdefault(f"{prefix}ffn_{module.rpartition('.')[2].removesuffix('_proj')}_exps.{kind}", []).append(
                tensor
            )
            continue
        if permuted and ("q_proj" in name or "k_proj" in name):
            heads = 2 if "q_proj" in name else 1
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if plus_one and "norm" in name:
            tensor = tensor + 1
        found[f"{prefix}{NAMES[module]}.{kind}"] = tensor
    return {**found, **{name: torch.stack(each) for name, each in stacks.items()}}


def stored_type(name: str, tensor: torch.Tensor, kind: str, *, tied: bool = False) -> T:
    if tensor.dim() < 2 or "gate_inp" in name:
        return T.F32
    # llama-quantize's Q6_K, whose blocks rows of 32 do not fill
    if kind[:2] in ("Q4", "Q5") and name == ("token_embd.weight" if tied else "output.weight"):
        return T.Q8_0
    blocks = {"F32": 1, "F16": 1, "BF16": 1}.get(kind, 32)
    return T[kind] if tensor.shape[-1] % blocks == 0 else T.F16


def write_gguf(
    folder: Path, tensors: Tensors, config: dict[str, Any], architecture: str = "llama", kind: str = "F32", **how: bool
) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    stored = {}
    for name, tensor in converted(tensors, **how).items():
        own = stored_type(name, tensor, kind)
        stored[name] = (quantize(tensor.numpy(), own), own)
    numbers = {**NUMBERS, "block_count": config["num_hidden_layers"]}
    return written(
        folder / "base.gguf", architecture, stored, numbers, more={"split.count": 1, "quantize.imatrix.x": 3}
    )


def recipe_of(root: Path, kind: Any, hidden: int = 32, **keys: Any) -> dict[str, Any]:
    """A linear merge of a GGUF file and a safetensors checkpoint of Llama."""
    config = llama_config(hidden=hidden)
    donor = write_gguf(root / "base", llama(0, hidden=hidden), config)
    other = write_model(root / "other", llama(1, hidden=hidden), config)
    return make_recipe("linear", [donor, other], None, {"weight": 0.5}, gguf=kind, **keys)


def merged(recipe: dict[str, Any], out: Path) -> Tensors:
    """The values of the merge, float32."""
    wide = {key: value for key, value in recipe.items() if key != "gguf"} | {"out_dtype": "float32"}
    return read_model(merge(wide, out).out)


def check(file: Path, values: Tensors, kind: str, **how: Any) -> gguf.GGUFReader:
    tied = how.pop("tied", False)
    reader = gguf.GGUFReader(file)
    found = {tensor.name: tensor for tensor in reader.tensors}
    expected = converted(values, **how)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        own = found[name]
        assert own.tensor_type == stored_type(name, value, kind, tied=tied)
        assert tuple(own.shape[::-1]) == tuple(value.shape)
        data = quantize(value.numpy(), own.tensor_type)
        assert np.array_equal(np.asarray(own.data).view(np.uint8).ravel(), data.view(np.uint8).ravel()), name
    return reader


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_bytes_are_those_of_the_package(tmp_path: Path, kind: str) -> None:
    recipe = recipe_of(tmp_path, kind)
    out = merge(recipe, tmp_path / "out").out
    values = merged(recipe, tmp_path / "wide")
    check(out / f"model-{kind}.gguf", values, kind)
    assert verify(out).ok
    # read back by us: the names and the order of the checkpoint
    checkpoint = open_checkpoint(str(out))
    assert checkpoint.tensors.keys() == values.keys()
    memory = merge_to_state_dict(plan(recipe))
    with checkpoint.reader() as reader:
        for name, value in values.items():
            own = stored_type(name, value, kind)
            if "lm_head" in name:
                own = stored_type("output.weight", value, kind)
            expected = torch.from_numpy(dequantize(quantize(value.numpy(), own), own)).view(value.shape)
            assert torch.equal(reader.tensor(checkpoint.tensors[name]).float(), expected)
            assert torch.equal(memory[name], expected.to(memory[name].dtype))


def test_metadata_are_those_of_the_donor(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "Q8_0", name="The merge", chat_template="{{ messages }}, and a longer text")
    result = merge(recipe, tmp_path / "out")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(result.out / "model-Q8_0.gguf").fields.items()}
    before = {name: f.contents() for name, f in gguf.GGUFReader(tmp_path / "base" / "base.gguf").fields.items()}
    own = {name for name in fields if not name.startswith("GGUF.")}
    same = {"general.architecture", "tokenizer.ggml.tokens", *(f"llama.{key}" for key in NUMBERS)}
    assert {name: fields[name] for name in same} == {name: before[name] for name in same}
    assert {name: fields[name] for name in own - same} == {
        "general.name": "The merge",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "tokenizer.chat_template": "{{ messages }}, and a longer text",
    }
    assert result.record["gguf"]["metadata"] == str(tmp_path / "base" / "base.gguf")
    assert result.record["dtypes"] == ["F16", "F32", "Q8_0"]


def test_threads_and_a_kill_change_no_byte(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "Q4_0")
    whole = merge(recipe, tmp_path / "a" / "out", threads=1).out
    assert read_files(merge(recipe, tmp_path / "b" / "out", threads=3, out_shard_size=9_000).out) == read_files(whole)
    out = tmp_path / "killed" / "out"
    out.parent.mkdir()
    process = in_a_process(merge_and_die, recipe, out, 60, {"threads": 1})
    process.join()
    assert process.exitcode == -9
    result = merge(recipe, out)
    assert result.record["continued"]
    assert read_files(result.out) == read_files(whole)


def test_gemma_adds_one_to_norms_and_a_tied_head_is_not_stored(tmp_path: Path) -> None:
    config = {**llama_config(hidden=32, tied=True), "model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
    how = {"permuted": False, "plus_one": True}
    donor = write_gguf(tmp_path / "base", llama(0, hidden=32, head=False), config, "gemma", "Q8_0", **how)
    recipe = make_recipe("linear", [donor], None, {"weight": 1}, gguf="Q4_0")
    out = merge(recipe, tmp_path / "out").out
    check(out / "model-Q4_0.gguf", merged(recipe, tmp_path / "wide"), "Q4_0", tied=True, **how)


def test_experts_are_stacked(tmp_path: Path) -> None:
    tensors, config = llama(0, hidden=32), llama_config(hidden=32)
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        for name in ("gate_proj", "up_proj", "down_proj"):
            own = tensors.pop(f"{mlp}.{name}.weight")
            tensors |= {f"{mlp}.experts.{i}.{name}.weight": own * (i + 1) for i in range(3)}
        tensors[f"{mlp}.gate.weight"] = torch.randn(3, 32)
        tensors[f"{mlp}.shared_expert_gate.weight"] = torch.randn(1, 32)
    config |= {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 3}
    donor = write_gguf(tmp_path / "base", tensors, config, "qwen2moe", permuted=False)
    recipe = make_recipe("linear", [donor], None, {"weight": 1}, gguf="Q8_0")
    out = merge(recipe, tmp_path / "out").out
    values = merged(recipe, tmp_path / "wide")
    expected = {name: value.flatten() if "shared_expert_gate" in name else value for name, value in values.items()}
    check(out / "model-Q8_0.gguf", expected, "Q8_0", permuted=False)


def test_metadata_of_a_file_that_is_not_merged(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "like", llama(5, hidden=32), llama_config(hidden=32))
    kept = {"rope_freqs.weight": (np.arange(8, dtype=np.float32), T.F32)}
    stored = {t.name: (np.array(t.data), t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    written(file, "llama", {**kept, **stored}, NUMBERS)
    models = [write_model(tmp_path / f"m{i}", llama(i, hidden=32), llama_config(hidden=32)) for i in range(2)]
    recipe = make_recipe("linear", models, None, {"weight": 0.5}, gguf={"type": "F16", "metadata": str(file)})
    result = merge(recipe, tmp_path / "out")
    values = merged(recipe, tmp_path / "wide")
    reader = gguf.GGUFReader(result.out / "model-F16.gguf")
    own = {tensor.name: tensor for tensor in reader.tensors}
    assert own["rope_freqs.weight"].data.tolist() == list(range(8))
    up = values["model.layers.1.mlp.up_proj.weight"].half()
    assert np.array_equal(own["blk.1.ffn_up.weight"].data, up.numpy())
    assert read_json(result.out, "config.json")["torch_dtype"] == "float16"
    # the same tensor of a donor counts as copied
    again = plan(make_recipe("linear", [file], None, {"weight": 1}, gguf="F16"))
    (census,) = again.census.values()
    assert (census.copied, census.left_out) == (1, {})


def test_an_adapter_on_a_gguf_file(tmp_path: Path) -> None:
    """A model with an adapter lends its metadata as well, and its rows are reordered after the adapter was added."""
    donor = write_gguf(tmp_path / "base", llama(0, hidden=32), llama_config(hidden=32))
    adapter = write_adapter(tmp_path / "adapter", pair(out=32, into=32), target_modules=["q_proj"])
    recipe = make_recipe("linear", [Path(f"{donor}+{adapter}")], None, {"weight": 1}, gguf="F32")
    out = merge(recipe, tmp_path / "out").out
    values = merged(recipe, tmp_path / "wide")
    assert not torch.equal(values[f"{Q}.weight"], llama(0, hidden=32)[f"{Q}.weight"])
    check(out / "model-F32.gguf", values, "F32")


def test_layers_of_a_stack_are_counted(tmp_path: Path) -> None:
    donor = write_gguf(tmp_path / "base", llama(0, hidden=32), llama_config(hidden=32))
    slices = [{"sources": [{"model": str(donor), "layer_range": each}]} for each in ([0, 2], [1, 2])]
    out = merge({"merge_method": "passthrough", "slices": slices, "gguf": "F32"}, tmp_path / "out").out
    reader = gguf.GGUFReader(out / "model-F32.gguf")
    assert reader.fields["llama.block_count"].contents() == 3
    own = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(own["blk.2.ffn_up.weight"], own["blk.1.ffn_up.weight"])


def test_stages_and_transformers_read_what_was_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    first = recipe_of(tmp_path, "F16", name="first")
    text = "\n---\n".join(yaml.safe_dump(each) for each in (first, make_recipe("passthrough", [Path("first")])))
    again = merge(load_recipes(text), tmp_path / "two").out
    out = merge({**first, "gguf": "F32"}, tmp_path / "one").out
    values = merged(first, tmp_path / "wide")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide").eval()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file="model-F32.gguf").eval()
    tokens = torch.arange(12).view(1, -1)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, plain(tokens).logits)
    assert all(torch.equal(value, values[name].half()) for name, value in read_model(again).items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gguf": {"type": "Q4_K"}}, "Did you mean 'Q4_K_M'"),
        ({"gguf": "q5_k_m"}, "Did you mean 'Q5_K_M'"),
        ({"gguf": "Q4_K_L"}, "Did you mean 'Q4_K_S'"),
        ({"gguf": "Q2_K_S"}, "llama-quantize OUT/model-F32.gguf OUT-Q2_K_S.gguf Q2_K_S"),
        ({"gguf": "IQ2_XS"}, "IQ2_XS cannot be written, only F32, F16, BF16, Q8_0, .*, same; write"),
        ({"gguf": "q8_0"}, "Did you mean 'Q8_0'"),
        ({"gguf": 8}, "Allowed: F32, F16"),
        ({"gguf": {"metadata": "x.gguf"}}, "'type' is missing"),
        ({"gguf": {"type": "F16", "metdata": "x.gguf"}}, "metdata"),
        ({"gguf": {"type": "F16", "metadata": "x.safetensors"}}, r"its name must end in \.gguf"),
        ({"gguf": {"type": "F16", "metadata": "missing.gguf"}}, "no such file"),
        ({"gguf": "F16", "quantize": "fp8_block"}, "leave this key out"),
        ({"gguf": "F16", "out_dtype": "float16"}, "leave this key out"),
        ({"gguf": "F16", "merge_method": "emr"}, "restores each model"),
        ({"gguf": "F16", "tokenizer": {"pad_to_multiple_of": 64}}, "the output has other tokens"),
    ],
)
def test_wrong_keys_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    recipe = recipe_of(tmp_path, "F16") | keys
    if "merge_method" in keys:
        recipe |= {"base_model": recipe["models"].pop(0)["model"], "parameters": {}}
    model = {"type": "BPE", "vocab": {f"t{i}": i for i in range(32)}, "merges": []}
    for folder in ("base", "other"):
        (tmp_path / folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    with pytest.raises(MergeError, match=message):
        merge(recipe, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]


def test_outputs_that_do_not_fit_the_metadata_are_refused(tmp_path: Path) -> None:
    config = llama_config(hidden=32)
    base = write_gguf(tmp_path / "base", llama(0, hidden=32), config)

    def refused(
        message: str, tensors: Tensors, metadata: Path | None = base, config: Any = config, **options: Any
    ) -> None:
        model = write_model(tmp_path / "m", tensors, config)
        kind = {"type": "Q4_1", **({} if metadata is None else {"metadata": str(metadata)})}
        with pytest.raises(MergeError, match=message):
            merge(make_recipe("linear", [model], None, {"weight": 1}, gguf=kind), tmp_path / "out", **options)
        for path in model.iterdir():
            path.unlink()
        model.rmdir()
        assert not list(tmp_path.glob("*out*"))

    refused(
        r"no GGUF file\. .*convert_hf_to_gguf.py OUT --outtype f16 .*llama-quantize OUT-F16.gguf OUT-Q4_1.gguf Q4_1",
        llama(0, hidden=32),
        None,
    )
    wide = llama_config(hidden=32, vocab=40)
    refused(r"token_embd is \[40, 32\] in the output, and \[32, 32\]", llama(0, hidden=32, vocab=40), config=wide)
    sizes = {"q": 32, "k": 16, "v": 16, "o": 32}
    biases = {f"model.layers.{i}.self_attn.{k}_proj.bias": torch.zeros(n) for i in range(2) for k, n in sizes.items()}
    refused(
        "attn_k is .16. in the output, and not there",
        llama(0, hidden=32) | biases,
        config={**config, "attention_bias": True},
    )
    other = llama(0, hidden=32) | {f"model.layers.{i}.mlp.router.weight": torch.zeros(24, 32) for i in range(2)}
    unknown = {**config, "model_type": "x", "architectures": ["X"]}
    refused(r"mlp\.router\.weight: the architecture 'llama' .* no such tensor", other, config=unknown)
    heads = tmp_path / "base" / "heads.gguf"
    stored = {t.name: (np.array(t.data), t.tensor_type) for t in gguf.GGUFReader(base).tensors}
    written(heads, "llama", stored, {**NUMBERS, "attention.head_count": 3})
    refused("32 rows are not those of 3 heads", llama(0, hidden=32), heads)
    lists = tmp_path / "base" / "lists.gguf"
    written(lists, "llama", stored, NUMBERS)
    lists.write_bytes(lists.read_bytes()[:-40])
    refused("truncated", llama(0, hidden=32), lists)
    large = llama(0, hidden=32)
    large["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e5
    refused("overflow the float16 scales of Q4_1", large)
    large["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.inf
    refused("Q4_1 with scales cannot store", large, allow_nonfinite=True)
