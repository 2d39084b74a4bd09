"""Fusion by training, from the recipe to the checkpoint."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file

from merganser.distillation import cache_logits, fuse, load_fusion
from merganser.distillation.training.fit import _arguments
from merganser.distillation.training.student import load_held_out, open_student
from merganser.errors import DataError, MergeError, NonFiniteError, OutputError, TaskError, UnsupportedError
from merganser.record import verify
from merganser.record.reading import read_record
from tests.calibration.interrupting import killed_after_removing
from tests.cli.tiny import run
from tests.evaluation.tiny import literal_bits_per_byte, load, make_model, text
from tests.making import read_json, read_model

# torch warns about accelerate's own use of it, when a state is loaded
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.usefixtures("little_to_collect"),
]


@lru_cache
def other_tokenizer() -> str:
    """Byte-level BPE with fewer tokens, and with special tokens of other names and numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=275,
        special_tokens=["<pad>", "<begin>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(9, 2000)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
    return tokenizer.to_str()


def in_bfloat16(folder: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in read_model(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.7, "do_sample": True}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a source like it, one with other tokens, and texts."""
    found = tmp_path_factory.mktemp("fusion")
    for name, seed in (("student", 1), ("source", 2)):
        in_bfloat16(make_model(found / name, seed, tie_word_embeddings=True))
    make_model(found / "other", 3)
    (found / "other" / "tokenizer.json").write_text(other_tokenizer())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<begin>", "eos_token": "<end>"}
    (found / "other" / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, template in (
        ("student", "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"),
        ("other", "{% for m in messages %}[{{ m.role }}] {{ m.content }}<end>{% endfor %}"),
    ):
        end = {"student": "{% if add_generation_prompt %}<s>assistant\n{% endif %}", "other": ""}[name]
        if name == "other":
            end = "{% if add_generation_prompt %}[assistant] {% endif %}"
        (found / name / "chat_template.jinja").write_text(template + end)
    (found / "a.txt").write_text(text(1, 100))
    (found / "b.txt").write_text(text(2, 100))
    (found / "held.txt").write_text(text(3, 60))
    return found


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "student": str(folder / "student"),
        "sources": [{"model": str(folder / "source")}],
        "data": {"files": [str(folder / "a.txt")], "sequences": 6, "length": 24},
        "lambda": 0.0,
        "top": 40,
        "training": {"steps": 4, "batch": 3, "learning_rate": 1e-2},
    }
    return {key: value for key, value in {**found, **changes}.items() if value is not None}


def test_a_student_is_taught_and_written(folder: Path, tmp_path: Path) -> None:
    data = {"files": [str(folder / "a.txt")], "sequences": 6, "length": 24}
    own = recipe(folder, held_out={"held": str(folder / "held.txt")}, held_out_windows=2, data=data)
    found = fuse(own, tmp_path / "out")
    about = found.record["fused"]
    assert about["sources"][0]["tokens_taught"] == about["tokens"] > 100
    history = about["history"]["fused"]
    assert [own["step"] for own in history] == [1, 2, 3, 4]
    assert history[-1]["taught"] < history[0]["taught"]
    # the control is plain fine-tuning on the same batches: it starts with the same text
    control = about["history"]["control"]
    assert control[0]["text"] == pytest.approx(history[0]["text"], rel=1e-6)
    assert control[-1]["loss"] == pytest.approx(control[-1]["text"], rel=1e-5)
    assert control[-1]["text"] < history[-1]["text"]
    scores = about["bits_per_byte"]
    assert [*scores] == ["student", "fused", "control"]
    assert len({own["held"] for own in scores.values()}) == 3
    # what is written is what was measured, and loads
    assert verify(tmp_path / "out").ok
    before, after = read_model(folder / "student"), read_model(tmp_path / "out")
    assert sorted(before) == sorted(after)
    assert "lm_head.weight" not in before
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) - 3
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert read_json(tmp_path / "out", name) == read_json(folder / "student", name)
    model, _ = load(tmp_path / "out")
    student = open_student(str(tmp_path / "out"), ExitStack())
    held_out = load_held_out({"held": str(folder / "held.txt")}, 2)
    assert held_out.bits_per_byte(model, student.opened) == scores["fused"]
    expected = literal_bits_per_byte(tmp_path / "out", (folder / "held.txt").read_text(), 64, 32)[0]
    assert load_held_out(dict(own["held_out"]), 99).bits_per_byte(model, student.opened)["held"] == pytest.approx(
        expected, rel=1e-5
    )
    with pytest.raises(UnsupportedError, match="out: holds a model that was trained"):
        read_record(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "alm", "top": None, "temperature": 10, "chunks": "debiased"},
        pytest.param({"loss": "alm", "top": None, "temperature": 10}, marks=pytest.mark.slow),
    ],
)
def test_a_source_equal_to_the_student_has_no_gradient(changes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    own = recipe(folder, sources=[{"model": str(folder / "student")}], **changes)
    own["training"] = {"steps": 1, "batch": 2}
    (first,) = fuse(own, tmp_path / "out", control=False).record["fused"]["history"]["fused"]
    assert first["grad_norm"] < 1e-5


class _Stop(BaseException):
    """As a kill: no code of ours runs after it but `finally`."""


@pytest.mark.parametrize("calls", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_a_killed_run_continues(calls: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merganser.distillation.training.trainer import FusionTrainer

    own = recipe(folder, choice="gate")
    own["lambda"] = 0.5
    own["sources"] = [{"model": str(folder / "source")}, {"model": str(folder / "student")}]
    own["training"] |= {"save_every": 1}
    # the first kill is in the training of the model, the second one in that of the control
    control = calls > 4
    whole = fuse(own, tmp_path / "whole", control=control)
    original, seen = FusionTrainer.compute_loss, []

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        if len(seen) == calls:
            raise _Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FusionTrainer, "compute_loss", counting)
    with pytest.raises(_Stop):
        fuse(own, tmp_path / "cut", control=control)
    assert not (tmp_path / "cut").exists()
    again = fuse(own, tmp_path / "cut", control=control)
    # only the step that was cut short is repeated
    assert len(seen) == 4 * (1 + control) + 1
    assert again.record["continued"]
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    for name in whole.record["fused"]["history"]:
        losses = [[entry["loss"] for entry in one.record["fused"]["history"][name]] for one in (whole, again)]
        assert losses[0] == losses[1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_state_counts_once_its_gate_is_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = recipe(folder, choice="gate")
    own["lambda"] = 0.5
    own["sources"] = [{"model": str(folder / "source")}, {"model": str(folder / "student")}]
    own["training"] |= {"steps": 3, "save_every": 1}
    original, seen = torch.save, []

    def counting(found: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if Path(str(file)).name == "fusion_gate.pt":
            seen.append(file)
            if len(seen) == 2:
                raise _Stop
        original(found, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", counting)
    with pytest.raises(_Stop):
        fuse(own, tmp_path / "out", control=False)
    # it goes on from the first state, as the second one is not complete
    assert fuse(own, tmp_path / "out", control=False).record["continued"]
    assert [Path(own).parent.name[-1] for own in seen] == ["1", "2", "2", "3"]


def test_states_are_removed_when_nothing_needs_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, original, seen = recipe(folder), shutil.rmtree, []
    own["training"] |= {"steps": 1, "save_every": 1}

    def removing(path: Any, *args: Any, **kwargs: Any) -> None:
        original(path, *args, **kwargs)
        if Path(path).name == "fused" and not seen:
            seen.append(path)
            raise _Stop

    monkeypatch.setattr(shutil, "rmtree", removing)
    with pytest.raises(_Stop):
        fuse(own, tmp_path / "out", control=False)
    assert fuse(own, tmp_path / "out", control=False).record["continued"]
    assert verify(tmp_path / "out").ok


def test_a_fusion_killed_at_its_very_end_trains_nothing_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merganser.distillation.training import preparation, run

    own = recipe(folder, held_out={"held": str(folder / "held.txt")})
    own["training"] |= {"steps": 1}
    # hidden states of the source, then the caches, which took it long to make
    with killed_after_removing(2):
        fuse(own, tmp_path / "out", control=False)
    monkeypatch.setattr(preparation, "cache_beginnings", None)
    monkeypatch.setattr(run, "fit", None)
    found = fuse(own, tmp_path / "out", control=False)
    assert found.record == json.loads((tmp_path / "out" / "merge.json").read_text())
    assert verify(tmp_path / "out").ok
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not {"caches", "fused", "texts-0.jsonl"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_the_parts_of_a_batch_train_as_the_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as models whose own loss takes no number of tokens: the Trainer then divides by the number of parts
    monkeypatch.setattr(transformers.LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    (tmp_path / "uneven.jsonl").write_text("\n".join(json.dumps({"text": text(i, 3 + 4 * i)}) for i in range(4)))
    sources = [{"model": str(folder / name)} for name in ("source", "other")]
    own = recipe(folder, sources=sources, choice="gate", data=str(tmp_path / "uneven.jsonl"))
    own |= {"loss": "alm", "temperature": 10, "lambda": 0.5}
    del own["top"]
    found = []
    for parts in (1, 2):
        own["training"] = {"steps": 2, "batch": 4, "accumulate": parts, "learning_rate": 1e-2}
        history = fuse(own, tmp_path / str(parts), control=False).record["fused"]["history"]["fused"]
        found.append([entry[key] for entry in history for key in ("loss", "text", "taught", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_one_device_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several GPUs the Trainer would use all at once, each for a part of every batch, with batches as many times as large."""
    made = load_fusion({"student": "s", "sources": [{"model": "t"}], "data": "a.txt", "training": {"steps": 1}})
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda own: 1 if own._n_gpu == 1 else 3))
    found = _arguments(made, tmp_path, 1, torch.device("cpu"))
    assert found.n_gpu == 1
    assert found.train_batch_size == 8


def test_caches_teach_their_own_texts(folder: Path, tmp_path: Path) -> None:
    for name, model in (("a", "source"), ("b", "other")):
        data = [folder / f"{name}.txt"]
        cache_logits(folder / model, data, tmp_path / name, k=8, sequences=4, length=24)
    own = recipe(folder, sources=[{"cache": str(tmp_path / name)} for name in "ab"], data=None, top=None)
    found = fuse(own, tmp_path / "out", control=False).record["fused"]
    assert found["sequences"] == 8
    both = [source["tokens_taught"] for source in found["sources"]]
    # all tokens of the one with the student's tokens, and those that begin where a token of the other begins
    assert both[0] == 4 * 23
    assert 20 < both[1] <= found["tokens"] - both[0]


@pytest.mark.parametrize("chunks", ["finest", "debiased"])
def test_sources_with_other_tokens(chunks: str, folder: Path, tmp_path: Path) -> None:
    own = recipe(folder, sources=[{"model": str(folder / "other")}], loss="alm", top=None, chunks=chunks)
    own["training"] |= {"steps": 6, "batch": 6}
    found = fuse(own, tmp_path / "alm", control=False).record["fused"]
    losses = [entry["taught"] for entry in found["history"]["fused"]]
    assert losses[-1] < losses[0]
    # every byte but those of the tokens that nothing predicts is in a chunk
    assert found["sources"][0]["tokens_taught"] >= 0.9 * found["tokens"]


@pytest.mark.parametrize("align", ["statistics", pytest.param("edit_distance", marks=pytest.mark.slow)])
def test_other_alignments(align: str, folder: Path, tmp_path: Path) -> None:
    own = recipe(folder, sources=[{"model": str(folder / "other")}], align=align)
    own["training"] |= {"steps": 1}
    assert fuse(own, tmp_path / "warped", control=False).record["fused"]["sources"][0]["tokens_taught"] > 0


def conversation(*contents: str) -> str:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return json.dumps({"messages": messages})


def test_answers_within_other_templates(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(
        conversation("the cat?", "it sat on a mat", "and then?", "def x")
        + "\n"
        + conversation("x", "while größere Häuser")
    )
    data = {"files": [str(tmp_path / "chat.jsonl")], "tokens": "completions"}
    own = recipe(folder, sources=[{"model": str(folder / "other")}], data=data)
    own["training"] |= {"steps": 1}
    found = fuse(own, tmp_path / "out", control=False).record["fused"]
    assert found["sequences"] == 2
    # in the student's template each answer ends with a token and a line break, which the other has not
    assert 0.3 < found["sources"][0]["tokens_taught"] / found["tokens"] < 1
    debiased = {**own, "loss": "alm", "chunks": "debiased", "lambda": 0.0}
    del debiased["top"]
    found = fuse(debiased, tmp_path / "debiased", control=False).record["fused"]
    # all bytes of the answers, within the templates of both; what surrounds them is in no chunk
    assert 0.3 < found["sources"][0]["tokens_taught"] / found["tokens"] < 1
    with pytest.raises(DataError, match=r"other teaches nothing: .* set tokens: completions"):
        fuse({**own, "data": {**data, "tokens": "all"}}, tmp_path / "all")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    cache_logits(folder / "other", [tmp_path / "chat.jsonl"], tmp_path / "cache", k=2)
    with pytest.raises(DataError, match="holds prompts or conversations, which the student writes in its own way"):
        fuse(recipe(folder, sources=[{"cache": str(tmp_path / "cache")}], data=None, top=None), tmp_path / "o")


@pytest.mark.slow
def test_low_rank_updates_are_added(folder: Path, tmp_path: Path) -> None:
    own = recipe(folder, lora=2)
    own["training"] = {"steps": 2, "batch": 4, "accumulate": 2, "gradient_checkpointing": True}
    fuse(own, tmp_path / "out", control=False)
    before, after = read_model(folder / "student"), read_model(tmp_path / "out")
    assert sorted(before) == sorted(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}


@pytest.mark.slow
def test_a_merge_is_taught_by_its_experts(folder: Path, tmp_path: Path) -> None:
    models = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in ("student", "source")]
    merge = {"merge_method": "linear", "models": models}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(merge))
    sources = [
        {"model": str(folder / name), "data": {"files": [str(folder / f"{text}.txt")], "sequences": 4, "length": 24}}
        for name, text in (("student", "a"), ("source", "b"))
    ]
    own = recipe(folder, student=str(tmp_path / "merge.yaml"), sources=sources, data=None)
    found = fuse(own, tmp_path / "out", control=False).record["fused"]
    assert [entry["tokens_taught"] for entry in found["sources"]] == [4 * 23, 4 * 23]
    assert found["history"]["fused"][-1]["taught"] < found["history"]["fused"][0]["taught"]
    assert sorted(read_model(tmp_path / "out")) == sorted(read_model(folder / "student"))
    # texts that both were given are trained on once, and both teach them
    sources[1]["data"] = {"files": [str(folder / "a.txt")], "sequences": 4, "length": 24, "tokens": "all", "seed": 0}
    sources[0]["data"] = {"files": [str(folder / "a.txt"), str(folder / "b.txt")], "sequences": 12, "length": 24}
    own = {**own, "sources": sources, "training": {"steps": 1}}
    found = fuse(own, tmp_path / "both", control=False).record["fused"]
    assert 12 <= found["sequences"] < 16


def test_what_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(kind: type[MergeError], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            fuse(recipe(folder, **changes), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    refused(MergeError, "nowhere", student="nowhere/x")
    refused(MergeError, "nowhere", sources=[{"model": "nowhere/x"}])
    refused(DataError, "nowhere: there is no such folder", sources=[{"cache": "nowhere"}], data=None, top=None)
    refused(DataError, r"none.txt: there is no such file", data=str(folder / "none.txt"))
    refused(
        DataError,
        "sequences: 99 of at most 24 tokens are asked for",
        data={"files": str(folder / "a.txt"), "sequences": 99, "length": 24},
    )
    refused(TaskError, "none.txt", held_out={"x": str(folder / "none.txt")})
    refused(DataError, "top: 321 tokens are asked for", top=321)
    refused(
        NonFiniteError,
        "the loss is not finite; a lower learning_rate",
        training={"steps": 9, "batch": 3, "learning_rate": 1e30},
    )
    import builtins

    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in ("accelerate", "peft"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(UnsupportedError, r"training needs accelerate, .*pip install 'merganser\[fusion\]'")


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = recipe(folder, held_out={"held": str(folder / "held.txt")})
    Path("r.yaml").write_text(yaml.safe_dump(own))
    plan = run("fuse", "train", "r.yaml", "out", "--dry-run")
    assert plan.code == 0, plan.err
    lines = plan.out.splitlines()
    assert lines[0].endswith("student: 25.8 K parameters, 25.8 K trained")
    assert lines[1] == "6 sequences, 144 tokens"
    assert lines[2] == "to run: 1 source, 144 tokens in all"
    assert lines[3] == (
        "4 steps of about 72 tokens: every sequence 2.0 times, for the fused model and again for the control"
    )
    assert not Path("out").exists()
    done = run("fuse", "train", "r.yaml", "out")
    assert done.code == 0, done.err
    assert done.out.startswith("1 source · 6 sequences · 4 steps · ")
    assert "source teaches 100.0% of 138 tokens, " in done.out
    rows = [line.split() for line in done.out.splitlines() if line.startswith("  ")]
    assert [row[0] for row in rows] == ["model", "student", "fused", "control"]
    again = run("fuse", "train", "r.yaml", "out")
    assert (again.code, again.err) == (2, "error: out: exists; choose another folder, or remove it\n")
    own["lamda"] = 0.5
    Path("r.yaml").write_text(yaml.safe_dump(own))
    typo = run("fuse", "train", "r.yaml", "new")
    assert typo.code == 2
    assert "unknown key 'lamda'. Did you mean 'lambda'?" in typo.err


def test_loaded_recipes_and_targets(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError, match="out: exists"):
        fuse(load_fusion(recipe(folder)), tmp_path / "out")
