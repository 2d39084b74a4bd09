"""Whole modules of several tasks whose outputs are mixed (BAM): laws, a layer written out, caches, and what is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from merganser.errors import CheckpointError, NotFoundError, ParameterError, UnsupportedError
from merganser.runtime.routed.gated import GatedModel, GateSettings, settings_of
from merganser.runtime.routed.gated.experts import find_modules
from merganser.runtime.routed.gated.fitting import Training
from merganser.runtime.routed.gated.modules import ExpertModules
from tests.cli.tiny import run
from tests.evaluation.tiny import make_model
from tests.reference import bam
from tests.runtime.making import text

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
TYPES = {
    "cohere": {"use_qk_norm": True},
    "cohere2": WINDOWED,
    "gemma": {},
    "gemma2": WINDOWED,
    "gemma3_text": WINDOWED,
    "granite": {},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "olmo2": {},
    "phi3": {"original_max_position_embeddings": 128},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
IDS = text(9, rows=2)


def plain(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A tiny model with random weights, those of norms among them."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **TYPES[kind], **changes})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def changed(model: Any, tasks: int = 2, keep: str = "nothing") -> dict[str, list[torch.Tensor]]:
    """Tensors of tasks that differ from the model's, but for those whose name contains `keep`."""
    draw = torch.Generator().manual_seed(5)
    found = {}
    for site, module in find_modules(model, "all").items():
        for leaf, own in module.named_parameters():
            if keep not in leaf:
                noise = [0.2 * torch.randn(own.shape, generator=draw) for _ in range(tasks)]
                found[f"{site}.{leaf}"] = [own.detach() + each.to(own.dtype) for each in noise]
    return found


def with_task(model: Any, changes: dict[str, list[torch.Tensor]], task: int) -> Any:
    """The model with the tensors of a task."""
    made = copy.deepcopy(model)
    made.load_state_dict({name: own[task] for name, own in changes.items()}, strict=False)
    return made


def gated(model: Any, changes: Any, kind: str = "bam", tasks: int = 2, **given: Any) -> ExpertModules:
    """Experts with gates of random weights in a model."""
    layers = ExpertModules(model, changes, settings_of(kind, **given), tasks)
    torch.manual_seed(3)
    layers.gates = layers.zeros()
    for weights in (layers.gates.weights, layers.gates.biases):
        for key in weights:
            weights[key] = torch.randn(weights[key].shape)
    return layers


@pytest.mark.parametrize("kind", TYPES)
@torch.inference_mode()
def test_one_task_is_the_model_with_its_modules(kind: str) -> None:
    """In every type of model: bit for bit, whether told or by gates; and generation with a cache is that without."""
    model = plain(kind)
    changes = changed(model)
    wanted = with_task(model, changes, 1)(IDS).logits
    shared = model(IDS).logits
    layers = gated(model, changes)
    assert layers.count == 4
    found = model.generate(IDS, **GREEDY)
    assert found.equal(model.generate(IDS, use_cache=False, **GREEDY))
    layers.tell(1)
    assert model(IDS).logits.equal(wanted)
    layers.tell(None)
    assert model(IDS).logits.equal(shared)
    layers.ask()
    mixed = model(IDS).logits
    for key, bias in layers.gates.biases.items():
        layers.gates.weights[key].zero_()
        bias.copy_(torch.tensor([0.0, 1000.0]))
    assert model(IDS).logits.equal(wanted)
    assert not torch.allclose(mixed, wanted, atol=0.1)
    assert not torch.allclose(mixed, shared, atol=0.1)


@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen2", "qwen3", "cohere2"])
@torch.inference_mode()
def test_shared_keys(kind: str) -> None:
    """Equal keys and values: what experts with their own give; others: those of a model that has their mean."""
    made = {name: plain(kind) for name in ("own", "shared", "mean")}
    other = changed(made["mean"])
    same = {}
    for name, own in other.items():
        mean = sum(own) / 2
        if any(word in name for word in (".k_proj.", ".v_proj.", ".k_norm.")):
            same[name] = [mean, mean]
        elif "qkv_proj" in name:
            same[name] = [torch.cat([each[:32], mean[32:]]) for each in own]
        else:
            same[name] = own
    gated(made["own"], same)
    gated(made["shared"], same, "bam-kv")
    torch.testing.assert_close(made["shared"](IDS).logits, made["own"](IDS).logits)
    layers = gated(made["mean"], other, "bam-kv")
    torch.testing.assert_close(made["mean"](IDS).logits, made["own"](IDS).logits)
    cached = made["mean"].generate(IDS, return_dict_in_generate=True, **GREEDY)
    assert cached.sequences.equal(made["mean"].generate(IDS, use_cache=False, **GREEDY))
    assert len(cached.past_key_values.layers) == 2
    assert layers.count == 4


@torch.inference_mode()
def test_experts_that_are_the_shared_model() -> None:
    """They give its logits up to rounding, whatever the gates."""
    model = plain()
    wanted = model(IDS).logits
    changes = {name: [own[0] * 0 + dict(model.named_parameters())[name]] * 3 for name, own in changed(model).items()}
    gated(model, changes, tasks=3)
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bam", "bam-kv"])
@torch.inference_mode()
def test_a_layer_written_out(kind: str) -> None:
    model = plain().double()
    changes = changed(model, tasks=3)
    layers = gated(model, changes, kind, tasks=3)
    seen: dict[str, Any] = {}
    block = model.model.layers[1]
    block.register_forward_hook(lambda module, args, output: seen.update(read=args[0], made=output))
    model(IDS)
    experts = []
    for task in range(3):
        own = {name.split(".")[-2]: each[task].numpy() for name, each in changes.items() if ".layers.1." in name}
        if kind == "bam-kv":
            for name in ("k_proj", "v_proj"):
                own[name] = torch.stack(changes[f"model.layers.1.self_attn.{name}.weight"]).mean(0).numpy()
        experts.append(own)
    gates = layers.gates
    sites = ["model.layers.1.self_attn", "model.layers.1.mlp"]
    routers = [(gates.weights[site].double().numpy(), gates.biases[site].double().numpy()) for site in sites]
    norms = block.input_layernorm.weight.numpy(), block.post_attention_layernorm.weight.numpy()
    for row in range(2):
        wanted = bam.layer(
            seen["read"][row].numpy(),
            experts,
            norms,
            (routers[0], routers[1]),
            heads=4,
            key_heads=2,
            theta=10000.0,
            epsilon=1e-6,
        )
        np.testing.assert_allclose(seen["made"][row].numpy(), wanted, rtol=1e-5, atol=1e-5)
    layers.noted = {}
    model(IDS)
    chosen = layers.noted["model.layers.1.mlp"]
    # tokens of a row have different MLPs
    assert ((chosen > 0) & (chosen < 1)).any()


@pytest.mark.parametrize("kind", ["bam", "bam-kv"])
@pytest.mark.parametrize("model_kind", ["llama", "gemma3_text"])
@torch.inference_mode()
def test_beams_padding_and_lookup_with_a_cache(kind: str, model_kind: str) -> None:
    """Prompts of several lengths in one batch, with beams whose keys change places, and tokens that are taken back."""
    model = plain(model_kind)
    gated(model, changed(model), kind)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :3], mask[0, :3] = 0, 0
    options = {"attention_mask": mask, "num_beams": 3, **GREEDY}
    assert model.generate(ids, **options).equal(model.generate(ids, use_cache=False, **options))
    alone = model.generate(IDS[:1, 3:], **GREEDY)
    both = model.generate(ids, attention_mask=mask, **GREEDY)
    assert both[:1, 3:].equal(alone)
    right = torch.cat([IDS[:1, 3:], torch.zeros(1, 3, dtype=torch.int64)], 1)
    short = model(right, attention_mask=mask[:1].flip(1)).logits[:, :6]
    torch.testing.assert_close(short, model(IDS[:1, 3:]).logits, rtol=1e-4, atol=1e-4)
    repeated = torch.cat([IDS[:1], IDS[:1]], 1)
    # some versions of transformers look for prompts only with a token that ends texts
    ended = GREEDY | {"eos_token_id": 2}
    looked = model.generate(repeated, prompt_lookup_num_tokens=3, **ended)
    wanted = model.generate(repeated, use_cache=False, **ended)
    # and some give a token more than asked for
    assert looked[:, : wanted.shape[1]].equal(wanted)


@pytest.mark.parametrize("configured", [True, False])
@torch.inference_mode()
def test_caches_of_the_user(configured: bool) -> None:
    model = plain()
    layers = gated(model, changed(model, tasks=3), tasks=3)
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    model(IDS[:, :5], past_key_values=cache)
    assert len(cache.layers) == 6
    assert {each.get_seq_length() for each in cache.layers} == {5}
    copied = copy.deepcopy(cache)
    wanted = model(IDS).logits[:, 5:]
    for each in (cache, copied):
        torch.testing.assert_close(model(IDS[:, 5:], past_key_values=each).logits, wanted, rtol=1e-4, atol=1e-5)
    copied.batch_select_indices(torch.tensor([1]))
    copied.crop(-2)
    last = model(IDS[1:, 7:], past_key_values=copied).logits
    torch.testing.assert_close(last, wanted[1:, 2:], rtol=1e-4, atol=1e-5)
    layers.tell(0)
    with pytest.raises(UnsupportedError, match="holds the keys of another task"):
        model(IDS[:, :1], past_key_values=cache)
    one = DynamicCache(config=model.config)
    model(IDS, past_key_values=one)
    assert len(one.layers) == 2


@torch.inference_mode()
def test_a_cache_that_the_model_makes() -> None:
    """Also where the first attention has no experts."""
    model = plain()
    gated(model, {name: own for name, own in changed(model).items() if "layers.1" in name})
    cache = model(IDS[:, :5], use_cache=True).past_key_values
    assert [each.get_seq_length() for each in cache.layers] == [5, 5, 0, 5]
    found = model(IDS[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(IDS).logits[:, 5:], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_caches_that_are_refused() -> None:
    model = plain()
    filled = DynamicCache(config=model.config)
    model(IDS, past_key_values=filled)
    layers = gated(model, changed(model))
    with pytest.raises(UnsupportedError, match="or of another model"):
        model(IDS, past_key_values=filled)
    with pytest.raises(UnsupportedError, match=r"experts need a cache of the kind DynamicCache.*this is StaticCache"):
        model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True
    with pytest.raises(UnsupportedError, match="not offloaded"):
        model(IDS, past_key_values=offloaded)
    layers.gates = None
    with pytest.raises(NotFoundError, match="there are no gates yet"):
        model(IDS)


@torch.inference_mode()
def test_attention_weights_are_those_of_all_experts() -> None:
    model = plain(attn_implementation="eager")
    changes = changed(model)
    wanted = [with_task(model, changes, task)(IDS, output_attentions=True).attentions[0] for task in (0, 1)]
    gated(model, changes)
    found = model(IDS, output_attentions=True).attentions
    assert len(found) == 2
    torch.testing.assert_close(found[0], torch.cat(wanted, 1))


def test_training_also_reaches_gates_of_mlps() -> None:
    """The value is that of the MLP that is chosen; the gradient is that of the softmax over all."""
    model, site = plain(), "model.layers.1.mlp"
    changes = changed(model, tasks=3)
    own = [with_task(model, changes, task).model.layers[1].mlp for task in range(3)]
    layers = gated(model, changes, tasks=3)
    with torch.no_grad():
        model(IDS)
    draw = torch.Generator().manual_seed(1)
    x, direction = (torch.randn(*IDS.shape, 32, generator=draw) for _ in range(2))
    with torch.no_grad():
        wanted = model.model.layers[1].mlp(x)
    weight = layers.gates.weights[site].requires_grad_(True)
    found = model.model.layers[1].mlp(x)
    torch.testing.assert_close(found.detach(), wanted)
    (found * direction).sum().backward()
    soft = weight.detach().clone().requires_grad_(True)
    shares = (x @ soft.T + layers.gates.biases[site]).softmax(-1)
    outputs = torch.stack([mlp(x).detach() for mlp in own], -1)
    ((outputs * shares.unsqueeze(-2)).sum(-1) * direction).sum().backward()
    torch.testing.assert_close(weight.grad, soft.grad, rtol=1e-4, atol=1e-5)


TEXTS = {"a": "the cat sat on a mat and then it was ", "b": "größere Häuser naïve café 東京 "}
LISTS = {name: [each] for name, each in TEXTS.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes of it, and a text of each."""
    folder = tmp_path_factory.mktemp("experts")
    make_model(folder / "base", 0)
    for seed, name in enumerate("ab", 1):
        make_model(folder / "models" / name, seed, like=folder / "base")
        (folder / f"{name}.txt").write_text(TEXTS[name] * 12, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["bam", "bam-kv"])
def test_gates_from_text_are_kept(root: Path, kind: str) -> None:
    out = f"{root / 'base'}+{root / 'models'}"
    given = [f"{name}={root / name}.txt" for name in "ab"]
    made = run("route", out, "--data", *given, "--length", 16, "--gates", kind, "--steps", 2)
    assert made.code == 0, made
    assert f"{kind} gates of 2 tasks" in made.out
    assert "experts in place of 4 modules" in made.out
    assert "7 other tensors of the tasks are not used" in made.out
    model = GatedModel(out)
    assert model.settings == settings_of(kind)
    ids = torch.tensor([model.tokenizer(TEXTS["a"])["input_ids"][:12]])
    shares = torch.cat([model.shares(torch.tensor([model.tokenizer(TEXTS[t])["input_ids"][:12]])) for t in "ab"])
    assert shares.argmax(1).tolist() == [0, 1]
    model.task = "a"
    told = model.logits(ids)
    model.task = None
    assert not torch.equal(model.logits(ids), told)
    assert model.generate(ids, **GREEDY).equal(model.generate(ids, use_cache=False, **GREEDY))
    measured = run("eval", f"{out}#gates", "--tasks", root / "a.txt", "--limit", 2, "--dtype", "float32")
    assert measured.code == 0, measured
    assert "by the task that has the largest share of them" in measured.out
    (root / "models/gates.safetensors").unlink()


def test_training_lowers_the_loss_and_leaves_experts_alone(root: Path) -> None:
    model = GatedModel(f"{root / 'base'}+{root / 'models'}", "bam")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    model.task = "b"
    ids = torch.tensor([[5, 9, 30, 41, 77]])
    told = model.logits(ids)
    model.task = None
    losses = model.fit(LISTS, length=16, training=Training(4, rate=0.05, batch=2))
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    model.task = "b"
    assert model.logits(ids).equal(told)


def test_memory_is_that_of_what_differs() -> None:
    """What a task shares with the model is not copied, adapters stay factors, and the model's own weights stay in their places."""
    model, up, queries = plain(), "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    changes: dict[str, Any] = changed(model)
    left, right = torch.randn(24, 2), torch.randn(2, 32)
    changes[queries] = [None, changes[queries][1]]
    changes[up] = [(left, right), None]
    places = {name: own.data_ptr() for name, own in model.named_parameters()}
    whole = sum(own.numel() for name, own in model.named_parameters() if ".layers." in name and "norm" not in name)
    state = {name: own[0] for name, own in changes.items() if name not in (queries, up)}
    wanted = copy.deepcopy(model)
    wanted.load_state_dict(state | {up: model.state_dict()[up] + left @ right}, strict=False)
    layers = gated(model, changes)
    assert layers.nbytes == 4 * (2 * whole - 32 * 32 - 2 * 24 * 32 + left.numel() + right.numel())
    assert {name: own.data_ptr() for name, own in model.named_parameters()} == places
    first, second = model.model.layers[0].self_attn.forward.args[0].experts
    assert first.q_proj.weight.data_ptr() == places[queries]
    assert second.q_proj.weight.data_ptr() == changes[queries][1].data_ptr()
    layers.tell(0)
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mix": "weights"}, "mix: must be 'parts', 'outputs', found 'weights'"),
        ({"keys": "shared"}, "keys: 'shared' goes with mix 'outputs'"),
        ({"top_where": "mlp"}, "top_where: 'mlp' goes with mix 'outputs'"),
        ({"mix": "outputs", "keys": "mean"}, "keys: must be 'own', 'shared'"),
        ({"mix": "outputs", "top_where": "heads"}, "top_where: must be"),
        ({"mix": "outputs", "rank": 4}, "rank: makes parts smaller, but experts"),
        ({"mix": "outputs", "density": 0.5}, "density: makes parts smaller, but experts"),
        ({"mix": "outputs", "site": "linear"}, "a gate per block that reads its input"),
        ({"mix": "outputs", "site": "linear", "reads": "outputs"}, "a gate per block that reads its input"),
        ({"mix": "outputs", "weights": "scores"}, "must add up to 1"),
        ({"mix": "outputs", "top": 1}, "with top, give 'top_softmax'"),
        ({"mix": "outputs", "where": "mlp", "keys": "shared"}, "keys: belong to attention"),
    ],
)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        GateSettings(**given)


def test_models_that_have_no_experts_here(root: Path, tmp_path: Path) -> None:
    mixture = AutoConfig.for_model("mixtral", **SIZES, num_local_experts=2)
    with pytest.raises(UnsupportedError, match="models of type 'mixtral' are not supported; cohere, "):
        find_modules(AutoModelForCausalLM.from_config(mixture), "all")
    base = root / "base"
    for name in "ab":
        shutil.copytree(base, tmp_path / "same" / name)
    with pytest.raises(UnsupportedError, match="no task changes an attention or MLP"):
        GatedModel(f"{base}+{tmp_path / 'same'}", "bam")
    make_model(tmp_path / "wide" / "a", 1, intermediate_size=40)
    found = run("route", f"{base}+{tmp_path / 'wide'}", "--data", f"a={root}/a.txt", "--length", 16, "--gates", "bam")
    assert found.code == 2
    assert "proj.weight is [40, 32] in task 'a', and [48, 32] in the shared model" in found.err
    found = run(
        "route",
        f"{base}+{root / 'models'}",
        "--data",
        f"a={root}/a.txt",
        f"b={root}/b.txt",
        "--gates",
        "bam",
        "--rank",
        4,
    )
    assert (found.code, "rank: makes parts smaller, but experts" in found.err) == (2, True), found


def test_gates_of_other_settings(root: Path) -> None:
    """A file whose gates are not those of its settings, and gates of parts that are said to be of experts."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    out = f"{root / 'base'}+{root / 'models'}"
    model = GatedModel(out, settings_of("bam", where="mlp"))
    model.layers.gates = model.layers.zeros()
    path = model.save()
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    save_file(load_file(path), path, metadata | {"settings": settings_of("bam").to_json()})
    with pytest.raises(CheckpointError, match=r"the gate of model\.layers\.0\.self_attn does not fit"):
        GatedModel(out)
    save_file(load_file(path), path, metadata | {"settings": '{"mix": "outputs", "weights": "scores"}'})
    with pytest.raises(CheckpointError, match="must add up to 1"):
        GatedModel(out)
    path.unlink()
