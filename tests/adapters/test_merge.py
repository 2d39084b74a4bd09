"""Merging adapters into an adapter: as peft combines them, and as methods for weights merge the changes themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merganser
from merganser.adapters import open_adapter
from merganser.checkpoint import Reader
from merganser.engine.adapters.plan import AdapterPlan, plan_adapters
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.errors import CheckpointError, MergeError, NonFiniteError, OutputError, RecipeError, UnsupportedError
from merganser.method.registry import get_method
from merganser.recipe import load_recipe
from merganser.record.verification import verify
from tests.adapters.test_apply import Q, pair, randomised, write_adapter
from tests.cli.tiny import names, run
from tests.making import HIDDEN, VOCAB, Tensors, llama, llama_config, write_model

V = "model.layers.1.self_attn.v_proj"


def recipe(method: str, *adapters: Path, parameters: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "models": [{"model": str(adapter)} for adapter in adapters],
        "parameters": parameters or {},
        **keys,
    }


def changes(folder: Path) -> dict[str, Tensor]:
    """What an adapter adds to each module, in float64."""
    adapter = open_adapter(str(folder))
    with Reader() as reader:
        return {
            name: reader.tensor(each.b).double() @ reader.tensor(each.a).double() * each.scale
            for name, each in adapter.changes.items()
        }


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters of ranks 2, 3 and 2 with scales of their own; the last one lacks a module."""
    found = []
    for seed, rank in enumerate([2, 3, 2]):
        tensors: Tensors = {}
        for i, (module, out) in enumerate([(Q, HIDDEN), (V, HIDDEN // 2)][: 2 - seed // 2]):
            tensors[f"{module}.lora_A.weight"] = draw(10 * seed + i, rank, HIDDEN)
            tensors[f"{module}.lora_B.weight"] = draw(10 * seed + i + 5, out, rank)
        found.append(write_adapter(tmp_path / f"a{seed}", tensors, r=rank, lora_alpha=seed + 1))
    return found


# found out by the engine, which reduces both sides of the factors, or one for knots
LOSSLESS = {
    "task_arithmetic": {"weight": 0.7},
    "iso_c": {},
    "wudi": {},
    "star": {},
    "knots": {"rule": "ties", "density": 0.5},
    "knots of inputs": {"rule": "ties", "density": 0.5, "basis": "input"},
}


@pytest.mark.parametrize("case", LOSSLESS)
def test_merged_as_whole_matrices_are(three: list[Path], tmp_path: Path, case: str) -> None:
    method, parameters = case.partition(" ")[0], LOSSLESS[case]
    record = merganser.merge(recipe(method, *three, parameters=parameters), tmp_path / "out").record
    assert record["merged_adapters"]["error"] < 1e-6
    found, given = changes(tmp_path / "out"), [changes(adapter) for adapter in three]
    for name in (Q, V):
        zero = torch.zeros_like(given[0][name])
        own = [each.get(name, zero) for each in given]
        expected = merge_tensor(get_method(method), zero, own, parameters, dtype=torch.float64)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_rank(three: list[Path], tmp_path: Path) -> None:
    parameters = {"weight": 1.0, "normalize": False}
    wide = merganser.merge(recipe("task_arithmetic", *three, parameters=parameters), tmp_path / "wide").record
    assert (wide["merged_adapters"]["rank"], open_adapter(str(tmp_path / "wide")).ranks) == (7, [7])
    record = merganser.merge(recipe("task_arithmetic", *three, parameters=parameters, rank=3), tmp_path / "out").record
    found, whole = changes(tmp_path / "out"), changes(tmp_path / "wide")
    squares = norms = 0.0
    for name, change in whole.items():
        values = torch.linalg.svdvals(change)
        torch.testing.assert_close((found[name] - change).norm(), values[3:].norm(), rtol=1e-5, atol=1e-5)
        squares, norms = squares + float(values[3:].square().sum()), norms + float(values.square().sum())
    assert record["merged_adapters"]["error"] == pytest.approx((squares / norms) ** 0.5, rel=1e-5)


def test_single_weights_in_two_spaces(three: list[Path], tmp_path: Path) -> None:
    """TIES goes by entries: in the core it is another merge, and on whole matrices the one that it is on models."""
    parameters = {"weight": 1.0, "density": 0.5}
    planned = merganser.plan(recipe("ties", *three, parameters=parameters))
    assert isinstance(planned, AdapterPlan)
    assert any("gives another result on the small matrices" in warning for warning in planned.warnings)
    merganser.merge(recipe("ties", *three, parameters=parameters), tmp_path / "core")
    merganser.merge(recipe("ties", *three, parameters=parameters, space="full", rank=HIDDEN), tmp_path / "full")
    given, found = [changes(adapter) for adapter in three], changes(tmp_path / "full")
    zero = torch.zeros_like(given[0][Q])
    expected = merge_tensor(get_method("ties"), zero, [each[Q] for each in given], parameters, dtype=torch.float64)
    torch.testing.assert_close(found[Q], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changes(tmp_path / "core")[Q], expected, atol=0.1)


def test_identical_adapters(three: list[Path], tmp_path: Path) -> None:
    """Factors that are not of full rank together: a basis of what they span is found all the same."""
    tensors = pair()
    same = [write_adapter(tmp_path / f"same{i}", tensors) for i in range(3)]
    merganser.merge(recipe("task_arithmetic", *same, parameters={"weight": 1.0}), tmp_path / "out")
    torch.testing.assert_close(changes(tmp_path / "out")[Q], 3 * changes(same[0])[Q], rtol=1e-5, atol=1e-5)


PEFT = [
    ("svd", {}),
    ("linear", {}),
    ("cat", {}),
    ("ties", {"density": 0.6}),
    ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    ("ties_svd", {"density": 0.6}),
    ("dare_linear", {"density": 0.6}),
    ("dare_ties", {"density": 0.6}),
    ("dare_linear_svd", {"density": 0.6}),
    ("dare_ties_svd", {"density": 0.6}),
    ("magnitude_prune", {"density": 0.6}),
    ("magnitude_prune_svd", {"density": 0.6}),
]


@pytest.fixture(scope="module")
def combined(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of peft with three adapters, which are saved, too."""
    import peft
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("peft")
    folder = write_model(root / "base", llama(0), llama_config())
    model = None
    for i, alpha in enumerate([8, 4, 6]):
        config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "down_proj", "embed_tokens"])
        if model is None:
            model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{i}", config)
        model.set_adapter(f"a{i}")
        randomised(model, seed=i)
    model.save_pretrained(root, save_embedding_layers=False)
    return root, model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "options"), PEFT)
def test_as_peft_combines(
    combined: Any, tmp_path: Path, kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws are ours: of those that drop at random, what is kept is handed to peft."""
    from peft.utils import merge_utils

    root, model = combined
    weights = [0.5, -0.8, 1.5]
    if kind.startswith("dare"):
        monkeypatch.setattr("merganser.ops.random.Random.keep", ours)
        monkeypatch.setattr(merge_utils.torch, "bernoulli", Theirs(not kind.endswith("svd")))
    adapters = [root / f"a{i}" for i in range(3)]
    given = [{"model": str(a), "parameters": {"weight": w}} for a, w in zip(adapters, weights, strict=True)]
    parameters = {"combination_type": kind, **options}
    merganser.merge(
        {"merge_method": "add_weighted_adapter", "models": given, "parameters": parameters}, tmp_path / "out"
    )
    found = open_adapter(str(tmp_path / "out"))
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    model.add_weighted_adapter(["a0", "a1", "a2"], weights, "merged", combination_type=kind, **options)
    with Reader() as reader:
        for name, change in found.changes.items():
            layer = model.base_model.model.get_submodule(name)
            parts = (
                (layer.lora_embedding_A, layer.lora_embedding_B) if change.embedding else (layer.lora_A, layer.lora_B)
            )
            a, b = (part["merged"] if change.embedding else part["merged"].weight for part in parts)
            own_a, own_b = reader.tensor(change.a), reader.tensor(change.b)
            assert (change.scale, layer.scaling["merged"]) == (1, 1)
            if kind.endswith("svd"):
                torch.testing.assert_close(own_b @ own_a, b @ a, rtol=1e-4, atol=2e-4)
                signs = torch.sign((own_a * a).sum(1))
                own_a, own_b = own_a * signs[:, None], own_b * signs
            torch.testing.assert_close(own_a, a, rtol=1e-4, atol=2e-4 if kind.endswith("svd") else 1e-5)
            torch.testing.assert_close(own_b, b, rtol=1e-4, atol=2e-3 if kind.endswith("svd") else 1e-5)


MASKS = [draw(90 + i, 2000) < 0.25 for i in range(3)]


def ours(_: object, model: int, shape: Any, probability: Tensor) -> Tensor:
    return MASKS[model][: math.prod(shape)].view(*shape)


class Theirs:
    """What peft draws: of each module for the three A and then for the three B, or for the three changes."""

    def __init__(self, factors: bool) -> None:
        self.factors = factors
        self.call = 0
        self.sizes = [0, 0, 0]

    def __call__(self, input: Tensor) -> Tensor:
        model, later = self.call % 3, self.factors and self.call % 6 >= 3
        self.call += 1
        if not self.factors and input.shape == (VOCAB, HIDDEN):
            return MASKS[model][: input.numel()].view(HIDDEN, VOCAB).T.float()
        start = self.sizes[model] if later else 0
        self.sizes[model] = input.numel()
        return MASKS[model][start : start + input.numel()].view(input.shape).float()


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_it(combined: Any, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    root, model = combined
    adapters = [root / f"a{i}" for i in range(3)]
    parameters = {"weight": 0.4, "normalize": False}
    merganser.merge(recipe("task_arithmetic", *adapters, parameters=parameters), tmp_path / "out")
    tokens = torch.arange(6)[None]
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), tmp_path / "out")
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    model.add_weighted_adapter(["a0", "a1", "a2"], [0.4] * 3, "merged", combination_type="cat")
    model.set_adapter("merged")
    torch.testing.assert_close(loaded.eval()(tokens).logits, model.eval()(tokens).logits, rtol=1e-3, atol=1e-3)


def test_dtype_and_seed(three: list[Path], tmp_path: Path) -> None:
    parameters = {"weight": 1.0, "density": 0.5}
    outputs = []
    for i, seed in enumerate([1, 1, 2]):
        given = recipe("dare_linear", *three, parameters=parameters, random_seed=seed, out_dtype="bfloat16")
        merganser.merge(given, tmp_path / f"o{i}")
        outputs.append((tmp_path / f"o{i}" / "adapter_model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] != outputs[2]
    assert {tensor.dtype.name for tensor in open_adapter(str(tmp_path / "o0")).tensors} == {"bfloat16"}


def test_tensors_that_one_adapter_replaces(tmp_path: Path) -> None:
    norm = {"model.norm.weight": torch.full((HIDDEN,), 2.0)}
    first = write_adapter(tmp_path / "a", pair() | norm)
    second = write_adapter(tmp_path / "b", pair())
    merganser.merge(recipe("task_arithmetic", first, second, parameters={"weight": 1.0}), tmp_path / "out")
    assert [*open_adapter(str(tmp_path / "out")).replaced] == ["model.norm.weight"]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["model.norm"]
    write_adapter(tmp_path / "b", pair() | norm)
    with pytest.raises(
        UnsupportedError, match=r"model\.norm\.weight: .*a and .*b each replace it whole|each replace it"
    ):
        merganser.merge(recipe("task_arithmetic", first, second, parameters={"weight": 1.0}), tmp_path / "no")


def test_a_stage_of_adapters(three: list[Path], tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", llama(0), llama_config())
    text = f"""\
name: both
merge_method: task_arithmetic
models: [{{model: {three[0]}}}, {{model: {three[1]}}}]
parameters: {{weight: 0.5, normalize: false}}
---
merge_method: passthrough
models: [{{model: {base}, adapter: both}}]
"""
    merganser.plan(text)
    merganser.merge(text, tmp_path / "out")
    from tests.making import read_model

    expected = llama(0)[f"{Q}.weight"] + sum(changes(each)[Q] for each in three[:2]).float() / 2
    torch.testing.assert_close(read_model(tmp_path / "out")[f"{Q}.weight"], expected, rtol=1e-5, atol=1e-5)


REFUSED: list[tuple[str, dict[str, Any], type[MergeError], str]] = [
    ("slerp", {"parameters": {"t": 0.5}}, MergeError, "slerp"),
    ("arcee_fusion", {}, MergeError, "arcee_fusion"),
    ("regmean", {}, UnsupportedError, "regmean needs statistics from data; merge models with adapters"),
    ("emr", {}, UnsupportedError, "emr needs a model from which others are restored"),
    ("lora_leg", {}, RecipeError, "unknown merge method 'lora_leg'. Did you mean 'lora_lego'"),
    ("lora_lego", {"space": "full"}, RecipeError, "space: lora_lego works on the factors themselves"),
    ("linear", {"parameters": {"weight": 1.0}, "chat_template": "auto"}, RecipeError, "chat_template: has no effect"),
    ("linear", {"parameters": {"weight": 1.0}, "rank": 0}, RecipeError, "rank: expected a whole number of at least 1"),
    ("linear", {"parameters": {"weight": 1.0}, "space": "ful"}, RecipeError, "'ful' is not known. Did you mean 'full'"),
    (
        "linear",
        {"parameters": {"weight": 1.0}, "base_model": "./nope"},
        MergeError,
        "base_model: model './nope' not found",
    ),
    (
        "ties",
        {"parameters": {"weight": 1.0, "density": 0.5, "trim_over": "model"}},
        UnsupportedError,
        "ties: cut is measured over the whole",
    ),
    (
        "add_weighted_adapter",
        {"parameters": {"combination_type": "linear"}},
        MergeError,
        r"combination_type linear needs adapters of one rank, got \[2, 3\]",
    ),
    (
        "add_weighted_adapter",
        {"parameters": {"combination_type": "cat"}, "rank": 3},
        MergeError,
        "gives the rank 5, the",
    ),
    (
        "add_weighted_adapter",
        {"parameters": {"combination_type": "kat"}},
        MergeError,
        "Did you mean 'cat'|must be one of",
    ),
    ("robust_merge", {}, MergeError, r"robust_merge needs adapters of one rank, got \[2, 3\]"),
]


@pytest.mark.parametrize(("method", "keys", "kind", "message"), REFUSED)
def test_refused(
    three: list[Path], tmp_path: Path, method: str, keys: dict[str, Any], kind: type[MergeError], message: str
) -> None:
    given = recipe(method, *three[:2], **keys)
    if method in ("slerp", "arcee_fusion"):
        given["base_model"] = str(write_model(tmp_path / "base", llama(0), llama_config()))
        given["models"] = given["models"][:1] if method == "arcee_fusion" else given["models"]
    before = names(tmp_path)
    with pytest.raises(kind, match=message):
        merganser.merge(given, tmp_path / "out")
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"use_dora": True}, CheckpointError, "has no lora_magnitude_vector"),
        ({"fan_in_fan_out": True}, CheckpointError, "fan_in_fan_out differs from that of"),
        ({"ensure_weight_tying": True}, UnsupportedError, "ensure_weight_tying: cannot be merged as an adapter yet"),
        ({"target_parameters": ["x"]}, UnsupportedError, "target_parameters: packed experts cannot be merged"),
        ({"bias": "lora_only"}, UnsupportedError, "bias is 'lora_only'"),
    ],
)
def test_adapters_that_cannot_be_merged(
    tmp_path: Path, change: dict[str, Any], kind: type[MergeError], message: str
) -> None:
    first, second = write_adapter(tmp_path / "a", pair()), write_adapter(tmp_path / "b", pair(), **change)
    with pytest.raises(kind, match=message):
        merganser.merge(recipe("task_arithmetic", first, second, parameters={"weight": 1.0}), tmp_path / "out")


def test_lengths_and_ia3(tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "a", pair())
    lengths = pair() | {f"{Q}.lora_magnitude_vector": torch.ones(HIDDEN)}
    for other in (
        write_adapter(tmp_path / "b", lengths, use_dora=True),
        write_adapter(tmp_path / "c", {f"{Q}.ia3_l": torch.ones(HIDDEN, 1)}, peft_type="IA3"),
    ):
        with pytest.raises(
            UnsupportedError, match="which is more than a low-rank change; merge models with it instead"
        ):
            merganser.merge(recipe("linear", first, other, parameters={"weight": 1.0}), tmp_path / "out")


def test_adapters_of_other_bases(three: list[Path], tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", pair(out=HIDDEN + 1))
    with pytest.raises(
        CheckpointError, match=r"q_proj: \[16, 16\] in .*a0, \[17, 16\] in .*other; only adapters of one base"
    ):
        merganser.merge(recipe("linear", three[0], other, parameters={"weight": 1.0}), tmp_path / "out")
    base = write_model(tmp_path / "base", llama(0, layers=1), llama_config(1))
    with pytest.raises(
        CheckpointError, match=r"changes model\.layers\.1\.self_attn\.v_proj\.weight, not found in .*base"
    ):
        merganser.merge(recipe("linear", *three, parameters={"weight": 1.0}, base_model=str(base)), tmp_path / "out")
    named = [write_adapter(tmp_path / name, pair(), base_model_name_or_path=f"org/{name}") for name in "xy"]
    plan = plan_adapters(load_recipe(recipe("linear", *named, parameters={"weight": 1.0})))
    assert plan.warnings[0].startswith("the adapters name different bases: org/x, org/y")


def test_not_finite(three: list[Path], tmp_path: Path) -> None:
    bad = write_adapter(tmp_path / "bad", {name: torch.full_like(each, torch.inf) for name, each in pair().items()})
    with pytest.raises(NonFiniteError, match=r"lora_A\.weight' holds NaN or infinity"):
        merganser.merge(recipe("linear", three[0], bad, parameters={"weight": 1.0}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_matrices_that_cannot_be_decomposed(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.linalg.LinAlgError("the algorithm did not converge")  # type: ignore[attr-defined]

    monkeypatch.setattr("merganser.engine.adapters.merge.open_space", fail)
    with pytest.raises(MergeError, match=r"layers\..*_proj: merge method linear: the algorithm did not converge"):
        merganser.merge(recipe("linear", *three, parameters={"weight": 1.0}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_and_models_together(three: list[Path], tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", llama(0), llama_config())
    with pytest.raises(RecipeError, match=r"a0 is an adapter, and .*base is a model. Write MODEL\+ADAPTER"):
        merganser.merge(recipe("linear", three[0], base, parameters={"weight": 1.0}), tmp_path / "out")
    with pytest.raises(RecipeError, match="rank: is for merging adapters, and no model of the recipe is one"):
        merganser.merge(recipe("linear", base, parameters={"weight": 1.0}, rank=3), tmp_path / "out")
    with pytest.raises(RecipeError, match="lora_lego merges adapters alone"):
        merganser.merge(recipe("lora_lego", base), tmp_path / "out")


def test_nothing_of_others_is_replaced(three: list[Path], tmp_path: Path) -> None:
    given = recipe("linear", *three, parameters={"weight": 1.0})
    merganser.merge(given, tmp_path / "out")
    assert all(file.problem is None for file in verify(tmp_path / "out").files)
    with pytest.raises(OutputError, match="out: exists"):
        merganser.merge(given, tmp_path / "out")
    merganser.merge(given, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="mine"):
        merganser.merge(given, tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="an input of this merge, is in this folder"):
        merganser.merge(given, three[0], overwrite=True)


def test_command(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "merge_method: iso_c\nmodels: [{model: a0}, {model: a1}]\nbase_model: base\nrank: 4\n"
    )
    write_model(tmp_path / "base", llama(0), llama_config())
    planned = run("plan", "r.yaml")
    assert planned.code == 0
    assert planned.out.startswith(
        """\
iso_c → an adapter of rank 4, 2 modules
reads
  adapter  a0  rank 2  2 modules  448 bytes  float32
  adapter  a1  rank 3  2 modules  672 bytes  float32
makes
  merges      on small matrices in common bases of the factors
"""
    )
    assert json.loads(run("plan", "r.yaml", "--json").out)["stages"][0]["rank"] == 4
    merged = run("merge", "r.yaml", "out")
    assert merged.code == 0
    assert merged.out.startswith("iso_c · 2 adapters · 2 modules · 224 parameters · ")
    assert run("verify", "out").code == 0
    assert run("merge", "r.yaml", "again", "-q").out == ""
