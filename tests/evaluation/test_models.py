"""What can be measured: checkpoints, adapters, recipes merged in memory, sidecar tasks; and what cannot."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import merganser
from merganser.engine.sidecars.restoration import restore
from merganser.errors import CheckpointError, MergeError, NotFoundError, TaskError, UnsupportedError
from merganser.evaluation import Evaluation, evaluate
from merganser.wording import default_names
from tests.adapters.test_apply import pair, write_adapter
from tests.evaluation.tiny import make_model, text

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(text(1, 100))
    return path


def figures(found: Evaluation) -> dict[str, float]:
    return {name: found.metric(name, "words").value for name in found.models}


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def configured(folder: Path, **changes: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_an_adapter_is_the_model_that_it_makes(zoo: Path, words: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", pair(Q, out=32, into=32))
    made = copied(zoo / "base", tmp_path / "made")
    tensors = load_file(made / "model.safetensors")
    factors = pair(Q, out=32, into=32)
    tensors[f"{Q}.weight"] += 3 * (factors[f"{Q}.lora_B.weight"] @ factors[f"{Q}.lora_A.weight"])
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    found = evaluate([zoo / "base", f"{zoo / 'base'}+{adapter}", made], [words], dtype="float32")
    assert [info.kind for info in found.models.values()] == ["checkpoint", "adapter", "checkpoint"]
    values = figures(found)
    assert values["adapter"] == pytest.approx(values["made"], rel=1e-6)
    assert abs(values["adapter"] - values["base"]) > 0.01


def recipe(path: Path, *documents: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump_all(documents))
    return path


def ties(zoo: Path) -> dict[str, object]:
    models = [{"model": str(zoo / name), "parameters": {"weight": 0.5, "density": 0.5}} for name in "ab"]
    return {"merge_method": "ties", "base_model": str(zoo / "base"), "models": models, "dtype": "bfloat16"}


def test_a_recipe_is_merged_in_memory(zoo: Path, words: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path / "ties.yaml", ties(zoo))
    merganser.merge(path, tmp_path / "written")
    before = sorted(tmp_path.iterdir())
    found = evaluate([path, tmp_path / "written", merganser.load_recipe(path)], [words], dtype="float32")
    assert sorted(tmp_path.iterdir()) == before
    values = figures(found)
    assert values == {"ties": values["written"], "written": values["written"], "recipe": values["written"]}
    assert found.models["ties"].kind == "recipe"


def test_a_recipe_in_stages(zoo: Path, words: Path, tmp_path: Path) -> None:
    first = {**ties(zoo), "name": "first"}
    second = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 1.0}} for name in ("first", str(zoo / "a"))],
    }
    path = recipe(tmp_path / "both.yaml", first, second)
    merganser.merge(path, tmp_path / "written")
    values = figures(evaluate([path, tmp_path / "written"], [words], dtype="float32"))
    assert values["both"] == values["written"]


def test_a_task_of_a_merge_with_sidecars(zoo: Path, words: Path, tmp_path: Path) -> None:
    models = [{"model": str(zoo / name), "name": name} for name in "ab"]
    made = recipe(tmp_path / "emr.yaml", {"merge_method": "emr", "base_model": str(zoo / "base"), "models": models})
    merganser.merge(made, tmp_path / "out")
    restore(tmp_path / "out", "b", tmp_path / "restored")
    found = evaluate([f"{tmp_path / 'out'}#b", tmp_path / "restored", tmp_path / "out"], [words], dtype="float32")
    values = figures(found)
    assert values["out#b"] == values["restored"] != values["out"]
    assert found.models["out#b"].kind == "sidecar"
    with pytest.raises(NotFoundError, match=r"no task 'c'\. .*Tasks: a, b"):
        evaluate([f"{tmp_path / 'out'}#c"], [words])
    with pytest.raises(NotFoundError, match="has no sidecars, so no task 'b'"):
        evaluate([f"{zoo / 'a'}#b"], [words])


def test_weights_on_disk_of_any_form(zoo: Path, words: Path, tmp_path: Path) -> None:
    plain = copied(zoo / "a", tmp_path / "bin")
    torch.save(load_file(plain / "model.safetensors"), plain / "pytorch_model.bin")
    (plain / "model.safetensors").unlink()
    tied = make_model(tmp_path / "tied", 5, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    found = evaluate([zoo / "a", plain, tied], [words], dtype="float32")
    values = figures(found)
    assert values["a"] == values["bin"]
    assert not found.failures


def test_equal_contents_have_equal_hashes(zoo: Path, words: Path, tmp_path: Path) -> None:
    again = copied(zoo / "a", tmp_path / "again")
    other = configured(copied(zoo / "a", tmp_path / "other"), rope_theta=5000.0)
    found = evaluate([zoo / "a", again, other, zoo / "b"], [words], limit=1)
    a, same, config, b = (info.hash for info in found.models.values())
    assert a == same
    assert len({a, config, b}) == 3


def test_names() -> None:
    assert default_names(["x/a", "x/b", "merged.yaml"]) == ["a", "b", "merged"]
    assert default_names(["x/a", "y/a", "b"]) == ["x/a", "y/a", "b"]
    assert default_names(["r/x/a", "s/x/a", "org/name"]) == ["r/x/a", "s/x/a", "name"]
    assert default_names(["base+adapters/french"]) == ["french"]


def test_names_of_ones_own(zoo: Path, words: Path) -> None:
    found = evaluate([f"mine={zoo / 'a'}", zoo / "b"], [words], base=zoo / "base", limit=1)
    assert [*found.models] == ["base", "mine", "b"]
    assert [info.role for info in found.models.values()] == ["base", "model", "model"]
    assert [*evaluate({"x": zoo / "a"}, {"y": words}, limit=1).outcomes["x"]] == ["y"]


def test_a_model_in_two_roles_is_measured_once(zoo: Path, words: Path) -> None:
    found = evaluate([zoo / "base", zoo / "a"], [words], base=str(zoo / "base"), experts={"words": zoo / "a"}, limit=2)
    assert [*found.models] == ["base", "a"]
    assert [info.role for info in found.models.values()] == ["base", "expert"]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"word": "a"}, r"experts: 'word' is not a task\. Did you mean 'words'\? Tasks here: words"),
        (["a"], "experts: expected DOMAIN=MODEL, got 'a'"),
        (["words=a", "words=b"], "experts: 'words' has two, a and b"),
    ],
)
def test_experts_that_belong_to_no_task(zoo: Path, words: Path, experts: object, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        evaluate([zoo / "a"], [words], base=zoo / "base", experts=experts)  # type: ignore[arg-type]


def test_models_that_are_not_there(zoo: Path, words: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        evaluate([zoo / "nowhere"], [words])
    with pytest.raises(NotFoundError, match=r"adapter '.*gone' not found"):
        evaluate([f"{zoo / 'base'}+{zoo / 'gone'}"], [words])
    with pytest.raises(TaskError, match="models: none given"):
        evaluate([], [words])


def test_an_adapter_of_another_model(zoo: Path, words: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", pair(Q, out=16, into=16))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is \[16, 16\] here and \[32, 32\] in "):
        evaluate([f"{zoo / 'base'}+{adapter}"], [words])


def test_no_tokenizer(zoo: Path, words: Path, tmp_path: Path) -> None:
    folder = copied(zoo / "a", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"bare: has no tokenizer; put the tokenizer's files"):
        evaluate([folder], [words])


def test_a_damaged_tokenizer(zoo: Path, words: Path, tmp_path: Path) -> None:
    folder = copied(zoo / "a", tmp_path / "damaged")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"damaged: transformers cannot load the tokenizer: "):
        evaluate([folder], [words])


@pytest.mark.parametrize(("rows", "found"), [(299, "300 tokens, and the model 299"), (700, "300 tokens, .* 700")])
def test_a_tokenizer_of_another_model(words: Path, tmp_path: Path, rows: int, found: str) -> None:
    folder = make_model(tmp_path / "model", 0, vocab_size=rows)
    with pytest.raises(CheckpointError, match=f"the tokenizer does not match the model: it has {found} embeddings"):
        evaluate([folder], [words])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not a language model: config.json says Llama"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "is not a language model: config.json says BertModel"),
        ({"architectures": [], "model_type": "clip"}, "is not a language model: model_type is 'clip'"),
        ({"model_type": "llarma"}, "transformers cannot load config.json: ValueError: .*llarma"),
    ],
)
def test_no_language_model(zoo: Path, words: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = configured(copied(zoo / "a", tmp_path / "other"), **changes)
    with pytest.raises(CheckpointError, match=message):
        evaluate([folder], [words])


def test_no_config(zoo: Path, words: Path, tmp_path: Path) -> None:
    folder = copied(zoo / "a", tmp_path / "bare")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        evaluate([folder], [words])


def test_code_of_a_model_is_never_run(zoo: Path, words: Path, tmp_path: Path) -> None:
    folder = configured(copied(zoo / "a", tmp_path / "code"), auto_map={"AutoConfig": "own.Config"}, model_type="own")
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match=r"transformers cannot load config\.json"):
        evaluate([folder], [words])


def test_quantised_weights(zoo: Path, words: Path, tmp_path: Path) -> None:
    folder = configured(copied(zoo / "a", tmp_path / "q"), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="its weights are quantised"):
        evaluate([folder], [words])


def test_dequantised_weights(zoo: Path, words: Path, tmp_path: Path) -> None:
    """What float8 weights with scales stand for, against the same values stored as they are."""
    scaled, plain = copied(zoo / "a", tmp_path / "scaled"), copied(zoo / "a", tmp_path / "plain")
    stored, values = {}, {}
    for name, tensor in load_file(zoo / "a" / "model.safetensors").items():
        if tensor.dim() != 2 or "proj" not in name:
            stored[name] = values[name] = tensor
            continue
        scale = tensor.float().abs().amax() / 448
        stored[name], stored[f"{name}_scale"] = (tensor.float() / scale).to(torch.float8_e4m3fn), scale.view(1)
        values[name] = stored[name].float() * scale
    assert len(stored) > len(values)
    save_file(stored, scaled / "model.safetensors")
    save_file(values, plain / "model.safetensors")
    configured(scaled, quantization_config={"quant_method": "compressed-tensors"})
    scores = [figures(evaluate([model], [words], dtype="float32")) for model in (scaled, plain)]
    assert [*scores[0].values()] == [*scores[1].values()]


def test_without_transformers(zoo: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'merganser\[transformers\]'"):
        evaluate([zoo / "a"], [words])


def changed(source: Path, target: Path, name: str, tensor: torch.Tensor | None) -> Path:
    folder = copied(source, target)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensor if tensor is not None else tensors.pop(name)
    if tensor is None:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_nan_is_said_and_not_averaged(zoo: Path, words: Path, tmp_path: Path) -> None:
    broken = changed(zoo / "a", tmp_path / "broken", "model.norm.weight", torch.full((32,), float("nan")))
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"context": "the", "choices": [" cat", " mat"], "gold": 0}))
    found = evaluate(
        [zoo / "b", broken], [words, tmp_path / "quiz.jsonl"], base=zoo / "base", experts={"words": zoo / "a"}
    )
    assert found.metric("broken", "words") is None
    text_failure, choice_failure = found.failures
    assert re.fullmatch(r"broken: words: NaN or infinity in the logits, at item \d+ of the text", text_failure)
    assert choice_failure == f"broken: quiz: NaN or infinity in the logits, at {tmp_path / 'quiz.jsonl'}:1"
    assert found.retention is not None
    assert found.retention.models["broken"].mean is None
    assert found.metric("b", "words") is not None
    results = found.to_json()["results"]["broken"]["words"]
    assert results["metrics"] == {}
    assert results["failed"]
    json.dumps(found.to_json(), allow_nan=False)


def test_a_tensor_that_is_missing_fails_that_model_alone(zoo: Path, words: Path, tmp_path: Path) -> None:
    broken = changed(zoo / "a", tmp_path / "broken", f"{Q}.weight", None)
    found = evaluate([broken, zoo / "b"], [words])
    assert found.failures == [
        f"broken: {broken}: {Q}.weight is missing; LlamaForCausalLM needs it; fetch the model again"
    ]
    assert found.metric("b", "words") is not None
    assert "broken" not in found.outcomes
    misshapen = changed(zoo / "a", tmp_path / "misshapen", f"{Q}.weight", torch.zeros(4, 4))
    assert evaluate([misshapen], [words]).failures


def test_a_merge_that_fails_is_said(zoo: Path, words: Path, tmp_path: Path) -> None:
    broken = changed(zoo / "a", tmp_path / "broken", "model.norm.weight", torch.full((32,), float("nan")))
    plan = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 1.0}} for m in (broken, zoo / "b")],
    }
    found = evaluate([recipe(tmp_path / "r.yaml", plan)], [words])
    assert "model.norm.weight' holds NaN" in found.models["r"].failed
    plan["merge_method"] = "liner"
    with pytest.raises(MergeError, match="Did you mean 'linear'"):
        evaluate([recipe(tmp_path / "r.yaml", plan)], [words])
