"""Routed models in an evaluation: chosen by router and perplexity, told, and what they chose; adapters as tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merganser import merge, verify
from merganser.errors import MergeError
from merganser.evaluation import Evaluation, evaluate
from merganser.evaluation.scoring import text
from merganser.inference.language_model import open_model
from merganser.inference.stored import open_stored
from merganser.runtime.routed import RoutedModel, open_tasks
from merganser.runtime.routed.making import make_router
from merganser.runtime.routed.opened import routed_name
from merganser.runtime.routed.router import mix_of
from merganser.runtime.routed.tasks import Weights, blended
from tests.cli.tiny import run
from tests.evaluation.tiny import make_model

TEXTS = {"a": "the cat sat on a mat and then it was ", "b": "größere Häuser naïve café 東京 "}
IDS = torch.tensor([[5, 9, 30, 41], [7, 100, 3, 60]])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge with sidecars of two models, a folder of two adapters, and a text of each task."""
    folder = tmp_path_factory.mktemp("routed")
    make_model(folder / "base", 0)
    for seed, name in enumerate("ab", 1):
        make_model(folder / name, seed, like=folder / "base")
        (folder / f"{name}.txt").write_text(TEXTS[name] * 12, encoding="utf-8")
        write_adapter(folder / "adapters" / name, seed, str(folder / "base"))
    (folder / "other.txt").write_text("def return x = 1 ; " * 12)
    models = [{"model": str(folder / name), "name": name} for name in "ab"]
    written = {"merge_method": "twin", "base_model": str(folder / "base"), "models": models}
    merge({**written, "parameters": {"others": "merged"}}, folder / "out")
    for out in (folder / "out", folder / "adapters"):
        make_router(out, {name: [folder / f"{name}.txt"] for name in "ab"}, length=16)
    return folder


def write_adapter(folder: Path, seed: int, base: str | None) -> None:
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    factors = {"A": (2, 32), "B": (32, 2)}
    tensors = {
        name.format(layer, letter): torch.randn(shape, generator=draw)
        for layer in (0, 1)
        for letter, shape in factors.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": base,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measure(root: Path, models: list[str], tasks: tuple[str, ...] = ("a", "b"), **options: Any) -> Evaluation:
    files = [root / f"{name}.txt" for name in tasks]
    return evaluate(models, files, **{"dtype": "float32", "context": 24, "batch_tokens": 100, **options})


def weights_of(reference: str) -> Any:
    opened = open_model(open_stored(reference))
    with torch.inference_mode():
        return opened.load(opened.source.read(), torch.float32, torch.device("cpu"))(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["out", "adapters"])
def test_chosen_and_told_are_the_models_of_the_tasks(root: Path, kind: str) -> None:
    """Weights are overwritten when the task changes; the figures are those of each task's model, to the last digit."""
    out = str(root / kind)
    own = {name: f"{out}#{name}" if kind == "out" else f"{root / 'base'}+{out}/{name}" for name in "ab"}
    shared = {"out": out, "adapters": str(root / "base")}[kind]
    models = [f"auto={out}#auto", f"told={out}#told", f"shared={shared}"]
    found = measure(root, [*models, *(f"{name}={own[name]}" for name in "ab")], ("a", "b", "other"))
    for name in "ab":
        wanted = found.items(name, name)["bits"].tolist()
        for routed in ("auto", "told"):
            assert found.items(routed, name)["bits"].tolist() == wanted
            assert found.right(routed, name) == 1.0
        assert found.outcomes["auto"][name].chosen == {name: len(wanted)}
    # no task belongs to this text
    assert found.items("told", "other")["bits"].tolist() == found.items("shared", "other")["bits"].tolist()
    assert found.outcomes["told"]["other"].chosen.keys() == {"(shared)"}
    assert found.right("auto", "other") is None
    written = found.to_json()
    assert written["models"]["auto"]["kind"] == "routed"
    assert written["models"]["auto"]["told"] == {"a": "a", "b": "b"}
    assert "told" not in written["models"]["a"]
    assert written["results"]["auto"]["a"]["right"] == 1.0
    assert "chosen" not in written["results"]["a"]["a"]


@pytest.mark.parametrize("kind", ["out", "adapters"])
def test_a_change_of_task_overwrites_what_differs(root: Path, kind: str) -> None:
    out = str(root / kind)
    model = RoutedModel(out)
    tasks = open_tasks(out)
    for name in "aba":
        reference = f"{out}#{name}" if kind == "out" else f"{root / 'base'}+{out}/{name}"
        model.task = name
        assert torch.equal(model.logits(IDS), weights_of(reference))
        assert "model.embed_tokens.weight" in tasks.weights(name).shared
        assert "model.layers.0.self_attn.q_proj.weight" not in tasks.weights(name).shared
    with pytest.raises(KeyError):
        tasks.weights("a")["missing"]


def test_by_perplexity_the_likeliest_model_is_chosen(root: Path) -> None:
    out = f"{root / 'out'}"
    model = RoutedModel(out, by="perplexity")
    logits = [weights_of(f"{out}#{name}") for name in "ab"]
    nats = [
        [-sum(float(own[row, at].log_softmax(-1)[IDS[row, at + 1]]) for at in range(3)) for row in (0, 1)]
        for own in logits
    ]
    assert model.choose(IDS) == ["a" if nats[0][row] < nats[1][row] else "b" for row in (0, 1)]
    # padding is not counted, on either side
    padded = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.int64)], 1)
    mask = torch.tensor([[1] * 4 + [0] * 3] * 2)
    assert model.choose(padded, mask) == model.choose(IDS)
    torch.testing.assert_close(model._surprise(padded, mask), torch.tensor(nats) / 3, rtol=1e-4, atol=1e-4)
    with pytest.raises(MergeError, match="fewer than two tokens"):
        model.choose(IDS, torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]]))
    with pytest.raises(MergeError, match="must be 'router', 'perplexity', 'subspaces', found 'chance'"):
        RoutedModel(out, by="chance")  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="at least 1, found 0"):
        RoutedModel(out, blend=0)
    found = measure(root, [f"{out}#perplexity"], limit=3)
    assert sum(found.outcomes["out#perplexity"]["a"].chosen.values()) == 3


def test_tasks_in_shares(root: Path) -> None:
    """The weights are the sum of the tasks' weights; one task in full is that task."""
    out = root / "out"
    model = RoutedModel(out, blend=2)
    opened = [open_stored(f"{out}#{name}").read() for name in "ab"]
    found = dict(model.model((("b", 0.75), ("a", 0.25))).named_parameters())
    for name, parameter in found.items():
        wanted = 0.25 * opened[0][name].float() + 0.75 * opened[1][name].float()
        torch.testing.assert_close(parameter.data, wanted.to(opened[0][name].dtype).float(), rtol=1e-5, atol=1e-6)
    model.task = "a"
    assert torch.equal(model.logits(IDS), weights_of(f"{out}#a"))
    model.task = None
    ids = torch.tensor([model.tokenizer(TEXTS["a"])["input_ids"][:6]])
    [mix] = model.mixes(ids)
    assert mix[0][0] == "a"
    assert sum(share for _, share in mix) == 1.0
    router = model.router
    assert router is not None
    with torch.inference_mode():
        states = model.shared.base_model(input_ids=ids).last_hidden_state[0].mean(0)
    scores = dict(zip("ab", (router.rows @ states).tolist(), strict=True))
    above = {name: max(0.0, score) for name, score in scores.items()}
    for name, share in mix:
        assert abs(share - above[name] / sum(above.values())) < 0.051
    found_by = measure(root, [f"{out}#blend"], limit=3)
    assert found_by.outcomes["out#blend"]["a"].chosen == {"a": 3}
    likely = RoutedModel(out, by="perplexity", blend=2).mixes(IDS)
    for row, mix in enumerate(likely):
        alpha = torch.tensor([math.exp(-float(nats)) for nats in model._surprise(IDS, torch.ones_like(IDS))[:, row]])
        assert abs(dict(mix)["a"] - float(alpha.softmax(0)[0])) < 0.026


@pytest.mark.parametrize(
    ("scores", "most", "mix"),
    [
        ([0.6, 0.3, 0.1], 3, (("x", 0.6), ("y", 0.3), ("z", 0.1))),
        ([0.6, 0.3, 0.1], 2, (("x", 0.65), ("y", 0.35))),
        ([0.1, 0.9, -0.5], 3, (("y", 0.9), ("x", 0.1))),
        ([0.001, 1.0, 0.0], 3, (("y", 1.0),)),
        ([-0.3, -0.1, -0.2], 2, (("y", 1.0),)),
        ([0.5, 0.5, 0.5], 1, (("x", 1.0),)),
    ],
)
def test_shares_are_twentieths(scores: list[float], most: int, mix: tuple[tuple[str, float], ...]) -> None:
    assert mix_of(["x", "y", "z"], scores, most) == mix


def test_tasks_that_cannot_be_blended() -> None:
    def made(**shapes: int) -> Weights:
        return Weights(tuple(shapes), lambda name: torch.ones(shapes[name]), frozenset())

    with pytest.raises(MergeError, match="q: only some of the tasks have this tensor"):
        blended([(made(p=2), 0.5), (made(p=2, q=1), 0.5)])
    with pytest.raises(MergeError, match="p: the tasks have different shapes here"):
        blended([(made(p=2), 0.5), (made(p=3), 0.5)])["p"]


def test_measurements_belong_to_a_router(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    score = text.score
    monkeypatch.setattr(text, "score", lambda *given: calls.append(1) or score(*given))
    out, file = f"{root / 'out'}#auto", tmp_path / "e.json"
    first = measure(root, [out], json=file, limit=4)
    count = len(calls)
    again = measure(root, [out], json=file, limit=4)
    assert len(calls) == count
    assert again.to_json()["results"] == first.to_json()["results"]
    swapped = {"a": [root / "b.txt"], "b": [root / "a.txt"]}
    try:
        make_router(root / "out", swapped, length=16)
        other = measure(root, [out], json=file, limit=4)
    finally:
        make_router(root / "out", {name: [root / f"{name}.txt"] for name in "ab"}, length=16)
    assert len(calls) > count
    [name] = other.models
    assert other.right(name, "a") == 0.0
    assert not math.isclose(other.metric(name, "a").value, first.metric(name, "a").value)


def test_questions_are_routed_by_their_context(root: Path, tmp_path: Path) -> None:
    question = {"context": "the cat sat on", "choices": [" größere Häuser naïve café", " a mat"], "gold": 1}
    (tmp_path / "quiz.jsonl").write_text(json.dumps(question) + "\n")
    out = str(root / "out")
    found = evaluate([f"auto={out}#auto", f"a={out}#a"], [tmp_path / "quiz.jsonl"], dtype="float32")
    assert found.outcomes["auto"]["quiz"].chosen == {"a": 1}
    assert found.items("auto", "quiz")["loglikelihood"] == found.items("a", "quiz")["loglikelihood"]


def test_the_task_of_an_expert_is_told(root: Path, tmp_path: Path) -> None:
    (tmp_path / "domain.txt").write_text(TEXTS["b"] * 12, encoding="utf-8")
    found = evaluate(
        [f"told={root / 'out'}#told"],
        [tmp_path / "domain.txt"],
        base=root / "base",
        experts={"domain": root / "b"},
        dtype="float32",
        context=24,
    )
    assert found.outcomes["told"]["domain"].chosen.keys() == {"b"}


def test_command_prints_the_choices(root: Path) -> None:
    out = root / "out"
    found = run("eval", f"{out}#auto", f"{out}#told", "--tasks", root / "a.txt", "--limit", 4, "--dtype", "float32")
    assert found.code == 0, found
    assert "choices of out#auto" in found.out
    assert "100.0 %" in found.out
    assert "choices of out#told" not in found.out


def test_adapters_of_any_folder_are_routed(root: Path, tmp_path: Path) -> None:
    """A router lies in the folder; without a run record there is nothing to list it in, and it is replaced when made again."""
    for seed, name in enumerate("ab", 1):
        write_adapter(tmp_path / "set" / name, seed, None)
    reference = f"{root / 'base'}+{tmp_path / 'set'}"
    given = [f"{name}={root / name}.txt" for name in "ab"]
    for _ in range(2):
        found = run("route", reference, "--data", *given, "--length", 16)
        assert found.code == 0, found
    assert f"wrote {tmp_path / 'set' / 'router.safetensors'}" in found.out
    assert RoutedModel(reference).router is not None
    assert verify(root / "out").ok


def bad_sets(root: Path, folder: Path) -> dict[str, tuple[str, str]]:
    for name, base in {"same": None, "one": "x/base", "two": "y/base"}.items():
        write_adapter(folder / ("none" if name == "same" else "mixed") / name, 1, base)
    (folder / "empty").mkdir()
    return {
        "no tasks": (f"{folder / 'empty'}#auto", "no sidecars (sidecars/index.json) and no folders of adapters"),
        "no folder": (f"{folder / 'missing'}#auto", "no such folder"),
        "no base": (f"{folder / 'none'}#auto", "names no base (base_model_name_or_path); give it: BASE+"),
        "two bases": (f"{folder / 'mixed'}#auto", "one is an adapter of x/base, two of y/base"),
        "no router": (f"{root / 'base'}+{folder / 'mixed'}#auto", "has no router"),
        "no task": (f"{root / 'out'}#c", "no task 'c'"),
    }


@pytest.mark.parametrize("case", ["no tasks", "no folder", "no base", "two bases", "no router", "no task"])
def test_bad_references(root: Path, tmp_path: Path, case: str) -> None:
    reference, message = bad_sets(root, tmp_path)[case]
    with pytest.raises(MergeError) as caught:
        measure(root, [reference])
    assert message in str(caught.value)


def test_tasks_of_lm_eval_need_one_model(root: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(MergeError, match="chooses among several; give texts"):
        evaluate([f"{root / 'out'}#auto"], ["lambada_openai"])


def test_names_of_tasks_come_first(tmp_path: Path) -> None:
    (tmp_path / "sidecars" / "auto").mkdir(parents=True)
    assert routed_name(f"{tmp_path}#auto") is None
    assert routed_name(f"{tmp_path}#told") == (str(tmp_path), "told")
    assert routed_name(f"{tmp_path}#a") is None
    assert routed_name(tmp_path) is None
