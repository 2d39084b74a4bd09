"""Gates over parts of tasks: the arithmetic written out, batches, caches, what is stored, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser import merge, verify
from merganser.errors import CheckpointError, MergeError, NotFoundError, ParameterError, UnsupportedError
from merganser.evaluation import evaluate
from merganser.inference.language_model import open_model
from merganser.inference.stored import open_stored
from merganser.runtime.routed import open_tasks
from merganser.runtime.routed.gated import KINDS, GatedModel, GateSettings, settings_of
from merganser.runtime.routed.gated.fitting import Training
from merganser.runtime.routed.gated.making import make_gates
from merganser.runtime.routed.gated.stored import GATES_FILE
from tests.cli.tiny import run
from tests.evaluation.tiny import make_model

TEXTS = {"a": "the cat sat on a mat and then it was ", "b": "größere Häuser naïve café 東京 "}
IDS = torch.tensor([[5, 9, 30, 41, 77], [7, 100, 3, 60, 12]])
WIDTHS = {"self_attn.q_proj": (32, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes of it, two adapters, a merge with sidecars, and a text of each task."""
    folder = tmp_path_factory.mktemp("gated")
    make_model(folder / "base", 0)
    for seed, name in enumerate("ab", 1):
        make_model(folder / "models" / name, seed, like=folder / "base")
        (folder / f"{name}.txt").write_text(TEXTS[name] * 12, encoding="utf-8")
        write_adapter(folder / "adapters" / name, seed, str(folder / "base"))
    models = [{"model": str(folder / "models" / name)} for name in "ab"]
    merge({"merge_method": "twin", "base_model": str(folder / "base"), "models": models}, folder / "out")
    return folder


def write_adapter(folder: Path, seed: int, base: str) -> None:
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in (0, 1):
        for module, (out, into) in WIDTHS.items():
            place = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(1 + seed, into, generator=draw)
            tensors[f"{place}.lora_B.weight"] = 0.1 * torch.randn(out, 1 + seed, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors")
    leaves = [name.rpartition(".")[2] for name in WIDTHS]
    config = {"peft_type": "LORA", "r": 1 + seed, "lora_alpha": 4, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))


def reference(root: Path, kind: str) -> str:
    """What the tasks of a kind of gates are here."""
    return f"{root / 'base'}+{root / 'models'}" if "wemoe" in kind else str(root / "adapters")


def opened(root: Path, kind: str, seed: int = 3, **changes: Any) -> GatedModel:
    """A model with gates of random weights, large enough to matter."""
    model = GatedModel(reference(root, kind), settings_of(kind, **changes))
    torch.manual_seed(seed)
    gates = model.layers.gates = model.layers.zeros()
    for weights in (gates.weights, gates.biases):
        for key in weights:
            weights[key] = torch.randn(weights[key].shape)
    return model


def loaded(reference: str) -> Any:
    found = open_model(open_stored(reference))
    return found.load(found.source.read(), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_all_weight_on_one_task_is_its_model(root: Path, kind: str) -> None:
    changes = {"e-wemoe": {"density": 1.0}, "smile": {"rank": 32}}.get(kind, {})
    model = opened(root, kind, **changes)
    for task in "ab":
        model.task = task
        if "wemoe" in kind:
            wanted, expert = loaded(str(root / "base")), loaded(str(root / "models" / task)).state_dict()
            own = {name: tensor for name, tensor in expert.items() if ".mlp." in name}
            wanted.load_state_dict(own, strict=False)
        else:
            wanted = loaded(f"{root / 'base'}+{root / 'adapters' / task}")
        torch.testing.assert_close(model.logits(IDS), wanted(IDS).logits, rtol=1e-4, atol=1e-4)
    model.layers.tell(None)
    assert torch.equal(model.logits(IDS), loaded(str(root / "base"))(IDS).logits)
    with pytest.raises(ParameterError, match="no task 'c'"):
        model.task = "c"


@pytest.mark.parametrize("kind", ["wemoe", "mole", "self-moe"])
def test_beams_keep_their_own_gates(root: Path, kind: str) -> None:
    """With a cache, what the gates remember of a beam moves with it: the same as reading all tokens again."""
    model = opened(root, kind)
    assert model.layers.gates is not None
    for weight in model.layers.gates.weights.values():
        weight.mul_(3)
    ids, mask = torch.tensor([[0, 0, 5, 9, 30], [7, 100, 3, 60, 12]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, again = (model.generate(ids, mask, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, again)


@pytest.mark.parametrize("pool", ["text", "prefix"])
@torch.inference_mode()
def test_weights_of_an_mlp_are_mixed_for_each_text(root: Path, pool: str) -> None:
    """WEMoE written out: the gate's mean over tokens, one MLP per text (or per token and those before it)."""
    model = opened(root, "wemoe", pool=pool)
    seen: dict[str, Any] = {}
    block = model.model.model.layers[1].mlp
    block.register_forward_hook(lambda module, given, output: seen.update(read=given[0], made=output))
    model.logits(IDS)
    gates = model.layers.gates
    assert gates is not None
    weight, bias = (each["model.layers.1.mlp"] for each in (gates.weights, gates.biases))
    folders = [root / "base", *(root / "models" / task for task in "ab")]
    base, *experts = (loaded(str(path)).model.layers[1].mlp for path in folders)
    for row in range(2):
        scores = seen["read"][row] @ weight.T + bias
        for token in range(5):
            mean = scores.mean(0) if pool == "text" else scores[: token + 1].mean(0)
            matrices = {}
            for name, own in base.named_parameters():
                changes = [dict(each.named_parameters())[name] - own for each in experts]
                matrices[name] = own + sum(share * change for share, change in zip(mean, changes, strict=True))
            x = seen["read"][row, token]
            gate = torch.nn.functional.silu(x @ matrices["gate_proj.weight"].T)
            wanted = (gate * (x @ matrices["up_proj.weight"].T)) @ matrices["down_proj.weight"].T
            torch.testing.assert_close(seen["made"][row, token], wanted, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_one_router_for_all_chooses_an_adapter_per_token(root: Path) -> None:
    """Self-MoE written out for one layer: softmax, and the largest weight alone."""
    model = opened(root, "self-moe")
    seen: dict[str, Any] = {}
    module = model.model.model.layers[1].self_attn.q_proj
    module.register_forward_hook(lambda module, given, output: seen.update(read=given[0], made=output))
    model.logits(IDS)
    gates = model.layers.gates
    assert gates is not None
    shares = (seen["read"] @ gates.weights["all"].T + gates.biases["all"]).softmax(-1)
    wanted = seen["read"] @ module.weight.T
    for number, task in enumerate("ab"):
        place = "base_model.model.model.layers.1.self_attn.q_proj"
        stored = load_file(root / "adapters" / task / "adapter_model.safetensors")
        a, b = stored[f"{place}.lora_A.weight"], stored[f"{place}.lora_B.weight"]
        chosen = (shares.argmax(-1) == number).float()
        scale = 4 / len(a)
        wanted = wanted + (chosen * shares[..., number])[..., None] * scale * (seen["read"] @ a.T @ b.T)
    torch.testing.assert_close(seen["made"], wanted, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_gates_read_the_outputs_of_all_adapters(root: Path) -> None:
    """MoLE written out for one layer, with the mean over the tokens so far in place of the sum over a fixed number."""
    model = opened(root, "mole")
    seen: dict[str, Any] = {}
    name = "model.layers.0.mlp.up_proj"
    module = model.model.model.layers[0].mlp.up_proj
    module.register_forward_hook(lambda module, given, output: seen.update(read=given[0], made=output))
    model.logits(IDS)
    gates = model.layers.gates
    assert gates is not None
    added = []
    for task in "ab":
        stored = load_file(root / "adapters" / task / "adapter_model.safetensors")
        a, b = (stored[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        added.append(4 / len(a) * (seen["read"] @ a.T @ b.T))
    units = torch.cat([each / each.norm(dim=-1, keepdim=True) for each in added], -1)
    scores = units @ gates.weights[name].T + gates.biases[name]
    steps = torch.arange(1, 6)[:, None]
    shares = (scores.cumsum(1) / steps).softmax(-1)
    wanted = seen["read"] @ module.weight.T + sum(shares[..., k : k + 1] * added[k] for k in (0, 1))
    torch.testing.assert_close(seen["made"], wanted, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_part_is_chosen_by_the_directions_that_it_reads(root: Path) -> None:
    """SMILE written out for one layer: the part in whose right singular vectors most of the input lies."""
    model = GatedModel(reference(root, "wemoe"), settings_of("smile", rank=3))
    seen: dict[str, Any] = {}
    module = model.model.model.layers[1].mlp.up_proj
    module.register_forward_hook(lambda module, given, output: seen.update(read=given[0], made=output))
    model.logits(IDS)
    x = seen["read"]
    base, *experts = (
        load_file(path / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
        for path in (root / "base", root / "models/a", root / "models/b")
    )
    lengths, added = [], []
    for expert in experts:
        u, s, v = torch.linalg.svd(expert - base, full_matrices=False)
        lengths.append((x @ v[:3].T).norm(dim=-1))
        added.append(x @ (u[:, :3] * s[:3] @ v[:3]).T)
    first = (lengths[0] > lengths[1])[..., None]
    wanted = x @ base.T + torch.where(first, added[0], added[1])
    torch.testing.assert_close(seen["made"], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedError, match="have nothing that could be trained"):
        model.fit(TEXTS_LISTS, training=Training(1))
    model.fit(TEXTS_LISTS, length=16)
    file = model.save()
    assert torch.equal(GatedModel(reference(root, "wemoe")).logits(IDS), model.logits(IDS))
    file.unlink()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_padding_changes_nothing(root: Path, kind: str, side: str) -> None:
    model = opened(root, kind, pool="text") if kind == "wemoe" else opened(root, kind)
    short = IDS[:1, :3]
    alone = model.logits(short)
    filled = torch.zeros(1, 2, dtype=torch.int64)
    row = torch.cat([filled, short] if side == "left" else [short, filled], 1)
    kept = slice(2, 5) if side == "left" else slice(0, 3)
    mask = torch.zeros(2, 5, dtype=torch.int64)
    mask[0, kept] = 1
    mask[1] = 1
    both = model.logits(torch.cat([row, IDS[1:]]), mask)
    torch.testing.assert_close(both[0, kept], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[1:], model.logits(IDS[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_generation_with_a_cache_is_that_without(root: Path, kind: str) -> None:
    model = opened(root, kind)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(IDS, **options)
    assert found.equal(model.generate(IDS, use_cache=False, **options))
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, model.logits(ids)[:, -1:].argmax(-1)], 1)
    assert found.equal(ids)


@torch.inference_mode()
def test_weights_of_a_whole_text_are_those_of_the_prompt(root: Path) -> None:
    model = opened(root, "wemoe", pool="text")
    made = model.model(IDS, use_cache=True)
    token = made.logits[:, -1:].argmax(-1)
    cache = made.past_key_values
    once = model.model(token, past_key_values=cache).logits
    before = opened(root, "wemoe", pool="prefix").model(torch.cat([IDS, token], 1)).logits[:, -1:]
    assert not torch.allclose(once, before, atol=1e-3)
    with pytest.raises(UnsupportedError, match="gates have seen 6 tokens of 2 rows, and the cache holds 6 of 1"):
        model.model(token[:1], past_key_values=cache)
    cache.crop(-3)
    with pytest.raises(UnsupportedError, match="cannot be used for other rows or be shortened"):
        model.model(token, past_key_values=cache)


@pytest.mark.parametrize("kind", ["wemoe", "e-wemoe", "self-moe"])
def test_gates_from_text_are_kept(root: Path, kind: str) -> None:
    out = reference(root, kind)
    model = GatedModel(out, kind)
    model.fit(TEXTS_LISTS, length=16)
    shares = torch.cat([model.shares(torch.tensor([model.tokenizer(TEXTS[t])["input_ids"][:8]])) for t in "ab"])
    assert shares.argmax(1).tolist() == [0, 1]
    assert (shares.max(1).values > (0.6 if kind == "self-moe" else 0.55)).all()
    file = model.save()
    assert torch.equal(GatedModel(out).logits(IDS), model.logits(IDS))
    files = [root / "a.txt", root / "b.txt"]
    found = evaluate([f"gates={out}#gates"], files, dtype="float32", context=24, limit=3)
    # padding of shorter windows counts for nothing
    cut = [window for name in "ab" for window in windows_of(model, root / f"{name}.txt", 24, 3)]
    most = ["ab"[int(model.shares(torch.tensor([window])).argmax())] for window in cut]
    for number, name in enumerate("ab"):
        own = most[3 * number : 3 * number + 3]
        assert found.outcomes["gates"][name].chosen == {task: own.count(task) for task in sorted(set(own))}
        assert found.right("gates", name) == own.count(name) / 3 > 0.5
    assert found.outcomes["gates"]["a"].metrics["bits_per_byte"].value > 0
    assert found.to_json()["models"]["gates"]["kind"] == "routed"
    file.unlink()


def windows_of(model: GatedModel, file: Path, context: int, limit: int) -> list[list[int]]:
    """The input tokens of the first windows of a text, as an evaluation with half a window as its stride cuts it."""
    ids = model.tokenizer(file.read_text(encoding="utf-8"))["input_ids"]
    ends = [context + context // 2 * number for number in range(limit)]
    return [ids[end - context : end] for end in ends]


TEXTS_LISTS = {name: [text] for name, text in TEXTS.items()}


@pytest.mark.parametrize("change", [{"rank": 4}, {"density": 0.25}])
def test_smaller_parts_are_stored_with_the_gates(root: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    out = reference(root, "wemoe")
    model = GatedModel(out, settings_of("wemoe", **change))
    whole = GatedModel(out, "wemoe")
    assert model.part_bytes < (0.6 if "density" in change else 0.4) * whole.part_bytes
    name = "model.layers.0.mlp.up_proj"
    base, expert = (
        load_file(path / "model.safetensors")[f"{name}.weight"] for path in (root / "base", root / "models/b")
    )
    delta = expert - base
    if "rank" in change:
        u, s, v = torch.linalg.svd(delta)
        wanted = u[:, :4] * s[:4] @ v[:4]
    else:
        least = delta.abs().flatten().sort(descending=True).values[48 * 32 // 4 - 1]
        wanted = delta * (delta.abs() >= least)
    x = torch.eye(32)
    torch.testing.assert_close(model.parts[name].outputs(x)[:, 1].T, wanted, rtol=1e-4, atol=1e-5)
    model.fit(TEXTS_LISTS, length=16)
    shutil.copy(model.save(), tmp_path / GATES_FILE)
    for alone in (str(tmp_path), f"{root / 'base'}+{tmp_path}"):
        assert torch.equal(GatedModel(alone).logits(IDS), model.logits(IDS))
    (root / "models" / GATES_FILE).unlink()


@pytest.mark.parametrize("objective", ["loss", "entropy"])
def test_training_changes_gates_alone_and_helps(root: Path, objective: str) -> None:
    model = GatedModel(reference(root, "mole"), "mole")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    with pytest.raises(UnsupportedError, match="are trained, and have no closed form here"):
        model.fit(TEXTS_LISTS)
    training = Training(3, rate=0.05, objective=objective, batch=2)
    losses = model.fit(TEXTS_LISTS, length=16, training=training)
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert losses == GatedModel(reference(root, "mole"), "mole").fit(TEXTS_LISTS, length=16, training=training)


def test_the_balance_loss_makes_weights_alike(root: Path) -> None:
    def spread(balance: float) -> float:
        model = GatedModel(reference(root, "self-moe"), settings_of("self-moe", top=2))
        model.fit(TEXTS_LISTS, length=16, training=Training(4, rate=0.05, balance=balance, batch=2))
        shares = model.shares(torch.tensor([model.tokenizer(TEXTS["a"])["input_ids"][:16]]))
        return float((shares[:, 0] - shares[:, 1]).abs().mean())

    assert spread(10.0) < spread(0.0) - 0.1


def test_gates_of_sidecars_are_listed(root: Path, tmp_path: Path) -> None:
    given = [f"{name}={root / name}.txt" for name in "ab"]
    found = run("route", root / "out", "--data", *given, "--length", 16, "--gates", "wemoe", "--rank", 8)
    assert found.code == 0, found
    assert "wemoe gates of 2 tasks" in found.out
    assert "parts in 6 linear layers" in found.out
    assert "other tensors of the tasks are not used" in found.out
    assert f"wrote {root / 'out' / 'sidecars' / GATES_FILE}" in found.out
    assert verify(root / "out").ok
    again = run("route", root / "out", "--data", *given, "--length", 16, "--gates", "mole", "--steps", 2, "--json")
    assert again.code == 0, again
    assert len(json.loads(again.out)["trained"]) == 2
    measured = run("eval", f"{root / 'out'}#gates", "--tasks", root / "a.txt", "--limit", 2, "--dtype", "float32")
    assert measured.code == 0, measured
    assert "choices of out#gates: windows or questions by the task that has the largest share of them" in measured.out
    assert re.search(r"^ *a +\d+\.0 %", measured.out, re.MULTILINE), measured.out


def test_gates_from_files_report_held_out_text(root: Path) -> None:
    out = reference(root, "self-moe")
    report = make_gates(out, {name: [root / f"{name}.txt"] for name in "ab"}, "self-moe", length=16)
    assert set(report.right.values()) == {1.0}
    told = GatedModel(out)
    ids = torch.tensor([told.tokenizer(TEXTS["a"] * 12)["input_ids"]])
    assert report.loss["a"].keys() == {"shared", "told", "gates"}
    assert ids.shape[1] // 16 == report.fitted["a"] + len(range(1, ids.shape[1] // 16, 5))
    assert report.layers == 6
    assert report.unused == 0
    report.file.unlink()


def test_snippet_of_the_page(root: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/gates.md").read_text(encoding="utf-8")
    [snippet] = re.findall(r"^```python with-tokenizer\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for name, task in (("math", "a"), ("python", "b")):
        shutil.copytree(root / "models" / task, tmp_path / "experts" / name)
    names = {"math_texts": [TEXTS["a"]], "python_texts": [TEXTS["b"]]}
    exec(snippet.replace('"base+experts"', repr(f"{root / 'base'}+{tmp_path / 'experts'}")), names)
    assert len(names["tokens"]) == 2


def test_fine_tunes_are_tasks_of_a_router_too(root: Path) -> None:
    tasks = open_tasks(reference(root, "wemoe"))
    assert (tasks.kind, tasks.tasks) == ("models", ("a", "b"))
    assert tasks.factors("a", "model.layers.0.mlp.up_proj.weight") is None
    with pytest.raises(NotFoundError, match="to choose among models such as a, name their base: BASE"):
        open_tasks(root / "models")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"where": "heads"}, "where: must be 'all', 'mlp', 'attention', found 'heads'"),
        ({"site": "model"}, "site: must be 'block', 'linear'"),
        ({"reads": "outputs"}, "that read outputs belong to one linear layer"),
        ({"reads": "projection", "site": "linear"}, "need the singular vectors of parts"),
        ({"pool": "mean"}, "pool: must be"),
        ({"weights": "sigmoid"}, "weights: must be"),
        ({"top": 0}, "top: must be a whole number of at least 1, found 0"),
        ({"rank": 2.5}, "rank: must be a whole number"),
        ({"shared": "yes"}, "shared: must be true or false"),
        ({"density": 1.5}, "density: must be above 0 and at most 1"),
        ({"density": 0.5, "rank": 2}, "give one of them"),
    ],
)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        GateSettings(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": -1}, "steps: must be a whole number of at least 0"),
        ({"batch": 0}, "batch: must be"),
        ({"objective": "margin"}, "objective: must be 'loss' or 'entropy', found 'margin'"),
        ({"rate": 0.0}, "rate: must be a positive number"),
        ({"balance": -1.0}, "balance: must be a number of at least 0"),
    ],
)
def test_bad_training(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Training(**{"steps": 1} | given)


def damaged(path: Path, change: str) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    if change == "format":
        metadata["format"] = "9"
    elif change == "kind":
        del metadata["kind"]
    elif change in ("tasks", "shared", "settings"):
        metadata[change] = {"tasks": '["a"]', "shared": "x", "settings": '{"top": 0}'}[change]
    elif change == "nan":
        tensors["gate/all/weight"][0] = float("nan")
    elif change == "width":
        tensors["gate/all/weight"] = tensors["gate/all/weight"][:, :4].contiguous()
    else:
        del tensors[f"gate/all/{change}"]
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("format", "format 9 is of a later version"),
        ("kind", "holds no gates"),
        ("tasks", "is for the tasks a, there are a, b"),
        ("shared", "another shared model"),
        ("settings", "top: must be a whole number"),
        ("nan", "contains NaN or infinity"),
        ("width", "the gate of all does not fit"),
        ("weight", "the gate of all does not fit"),
        ("bias", "gates without biases"),
    ],
)
def test_damaged_gates(root: Path, change: str, message: str) -> None:
    model = GatedModel(reference(root, "self-moe"), "self-moe")
    model.layers.gates = model.layers.zeros()
    path = model.save()
    damaged(path, change)
    with pytest.raises(MergeError, match=message):
        GatedModel(reference(root, "self-moe"))
    path.unlink()


def test_what_cannot_have_gates(root: Path, tmp_path: Path) -> None:
    out = reference(root, "self-moe")
    with pytest.raises(NotFoundError, match="no such gates; make them from text"):
        GatedModel(out)
    with pytest.raises(NotFoundError, match="there are no gates yet"):
        GatedModel(out, "self-moe").logits(IDS)
    with pytest.raises(ParameterError, match=r"no kind 'wemo'\. Did you mean 'wemoe'"):
        GatedModel(out, "wemo")
    with pytest.raises(ParameterError, match="that of 'b' is empty"):
        GatedModel(out, "self-moe").fit({"a": ["the cat"]})
    with pytest.raises(ParameterError, match="no task 'c'"):
        GatedModel(out, "self-moe").fit({"c": ["the cat"]})
    same = tmp_path / "same"
    for name in "ab":
        shutil.copytree(root / "base", same / name)
    with pytest.raises(UnsupportedError, match="no task changes a linear layer"):
        GatedModel(f"{root / 'base'}+{same}", "wemoe")
    make_model(tmp_path / "wide" / "a", 1, intermediate_size=40)
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight is \[40, 32\] in task 'a'|gate_proj.weight is \[40, 32\]"
    ):
        GatedModel(f"{root / 'base'}+{tmp_path / 'wide'}", "wemoe")
    with pytest.raises(UnsupportedError, match="one gate for all needs sites that read the same"):
        GatedModel(out, settings_of("self-moe", site="linear"))
    model = opened(root, "wemoe", pool="text")
    path = model.save()
    with pytest.raises(UnsupportedError, match="shows them the tokens that are scored"):
        evaluate([f"{reference(root, 'wemoe')}#gates"], [root / "a.txt"])
    path.unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gates", "moe"], "no kind 'moe'"),
        (["--rank", 4], "--rank: is for gates"),
        (["--steps", 4], "--steps: is for gates"),
        (["--gates", "mole"], "are trained, and have no closed form here: give steps"),
        (["--gates", "wemoe", "--density", 2], "density: must be above 0"),
        (["--gates", "wemoe", "--objective", "x"], "objective: must be"),
    ],
)
def test_bad_options(root: Path, options: list[Any], message: str) -> None:
    found = run("route", root / "out", "--data", f"a={root}/a.txt", f"b={root}/b.txt", "--length", 16, *options)
    assert (found.code, message in found.err) == (2, True), found
