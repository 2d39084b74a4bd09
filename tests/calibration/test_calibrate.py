"""Statistics from data: their values, their files, and what they do not depend on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import merganser
from merganser.adapters import published_name
from merganser.calibration.forward import stream
from merganser.calibration.single import run
from merganser.calibration.single.preparation import prepare
from merganser.checkpoint import Reader
from merganser.errors import DataError, NonFiniteError, OutputError
from merganser.inference.language_model import Tokenizer
from merganser.statistics import Choice, Statistics, open_statistics
from tests.calibration.families import FAMILIES, save
from tests.calibration.literal import gram, rows_of
from tests.evaluation.tiny import add_tokenizer, text

ALL = ("gram", "second_moment", "magnitude")


def _model(folder: Path, family: str = "llama") -> Path:
    save(folder, family)
    add_tokenizer(folder)
    return folder


def _texts(file: Path, seed: int = 1, count: int = 6) -> Path:
    lines = [json.dumps({"text": text(seed * 100 + i, 8 + 3 * i)}) for i in range(count)]
    file.write_text("\n".join(lines))
    return file


def _read(found: Statistics) -> dict[tuple[str, str], Tensor]:
    with Reader() as reader:
        return {(s, name): found.read(reader, s, name) for s in found.statistics for name in found.tensors}


def _close(found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # products of both signs cancel: what rounding is measured by are the largest sums
        scale = float(tensor.abs().max())
        torch.testing.assert_close(
            found[key], tensor, rtol=1e-5, atol=1e-6 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )


def _sequences(folder: Path, file: Path, length: int = 24) -> list[dict[str, Tensor]]:
    """Cut the texts as the definition says: without padding, each window by itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for line in file.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        found += [{"input_ids": torch.tensor([ids[i : i + length]])} for i in range(0, len(ids), length)]
    return found


DENSE = {"llama": 7, "gpt2": 4, "phi3": 4, "gpt-neox": 4, "gemma2": 7, "bert": 6}


@pytest.mark.parametrize("family", DENSE)
def test_sums_are_those_of_the_definition(family: str, tmp_path: Path) -> None:
    model, data = _model(tmp_path / "model", family), _texts(tmp_path / "data.jsonl")
    found = merganser.calibrate(model, [data], tmp_path / "out", statistics=ALL, length=24)
    assert found.statistics == ("count", "magnitude", "second_moment", "gram")
    assert found.about["without"] == []
    assert len(found.tensors) == 4 * DENSE[family]
    rows = rows_of(model, FAMILIES[family][1], _sequences(model, data))
    with Reader() as reader:
        for name, own in found.tensors.items():
            inputs = torch.cat(rows[name])
            assert found.read(reader, "count", name).item() == len(inputs)
            shape = load_file(model / "model.safetensors")[name].shape
            assert shape[own.axis] == inputs.shape[1]
            sums = {statistic: found.read(reader, statistic, name) for statistic in ALL}
            assert [tensor.dtype for tensor in sums.values()] == [torch.float32, torch.float64, torch.float64]
            torch.testing.assert_close(sums["gram"], gram([inputs]).float(), rtol=1e-5, atol=1e-4)
            assert torch.equal(sums["gram"], sums["gram"].T)
            torch.testing.assert_close(sums["second_moment"], inputs.square().sum(0), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sums["magnitude"], inputs.abs().sum(0), rtol=1e-5, atol=1e-5)


EXPERTS = {
    "mixtral": {"w1.weight": "gate_up_proj", "w3.weight": "gate_up_proj", "w2.weight": "down_proj"},
    "qwen2-moe": {
        "gate_proj.weight": "gate_up_proj",
        "up_proj.weight": "gate_up_proj",
        "down_proj.weight": "down_proj",
    },
    "deepseek-v3": {
        "gate_proj.weight": "gate_up_proj",
        "up_proj.weight": "gate_up_proj",
        "down_proj.weight": "down_proj",
    },
}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_seen_with_their_own_tokens(family: str, tmp_path: Path) -> None:
    model, data = _model(tmp_path / "model", family), _texts(tmp_path / "data.jsonl")
    found = merganser.calibrate(model, [data], tmp_path / "out", length=24)
    # the router is not a matrix of `nn.Linear`
    assert all("gate.weight" in name for name in found.about["without"])
    rows = rows_of(model, FAMILIES[family][1], _sequences(model, data))
    tokens = sum(inputs["input_ids"].numel() for inputs in _sequences(model, data))
    counts: dict[str, int] = {}
    with Reader() as reader:
        for name in found.tensors:
            if ".experts." not in name:
                continue
            prefix, _, rest = name.partition(".experts.")
            expert, _, kind = rest.partition(".")
            prefix = prefix.replace("block_sparse_moe", "mlp")
            own = rows[f"{prefix}.experts.{EXPERTS[family][kind]}.{expert}"]
            count = found.read(reader, "count", name).item()
            assert count == len(own)
            expected = gram([torch.cat(own)]).float() if own else torch.zeros_like(found.read(reader, "gram", name))
            torch.testing.assert_close(found.read(reader, "gram", name), expected, rtol=1e-5, atol=1e-4)
            if EXPERTS[family][kind] == "down_proj":
                counts[prefix] = counts.get(prefix, 0) + int(count)
    assert counts
    assert set(counts.values()) == {2 * tokens}


def test_experts_in_one_tensor_have_an_axis_for_them(tmp_path: Path) -> None:
    model, data = _model(tmp_path / "model", "gpt-oss"), _texts(tmp_path / "data.jsonl")
    found = merganser.calibrate(model, [data], tmp_path / "out", length=24)
    rows = rows_of(model, FAMILIES["gpt-oss"][1], _sequences(model, data))
    tensors = load_file(model / "model.safetensors")
    names = [name for name in found.tensors if ".experts." in name]
    assert len(names) == 8
    with Reader() as reader:
        for name in names:
            own = found.read(reader, "gram", name)
            assert own.shape[1] == tensors[name].shape[found.tensors[name].axis]
            for expert in range(4):
                received = rows[f"{name}.{expert}"]
                assert found.read(reader, "count", name)[expert] == len(received)
                expected = gram(received).float() if received else torch.zeros_like(own[expert])
                torch.testing.assert_close(own[expert], expected, rtol=1e-5, atol=1e-4)


def test_encoder_and_decoder_are_seen_with_their_own_tokens(tmp_path: Path) -> None:
    model, data = _model(tmp_path / "model", "t5"), tmp_path / "data.jsonl"
    pairs = [{"prompt": text(i, 4 + i), "completion": text(50 + i, 7 - i)} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, pairs)))
    found = merganser.calibrate(model, [data], tmp_path / "out", length=64)
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert found.about["without"] == [f"encoder.{bias}", f"decoder.{bias}"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    sequences = []
    for pair in pairs:
        prompt, completion = tokenizer(pair["prompt"])["input_ids"], tokenizer(pair["completion"])["input_ids"]
        decoder = torch.tensor([[0, *completion]])
        sequences.append({"input_ids": torch.tensor([prompt]), "decoder_input_ids": decoder})
    rows = rows_of(model, FAMILIES["t5"][1], sequences)
    with Reader() as reader:
        for name in found.tensors:
            inputs = torch.cat(rows[name])
            assert found.read(reader, "count", name).item() == len(inputs)
            torch.testing.assert_close(found.read(reader, "gram", name), gram([inputs]).float(), rtol=1e-5, atol=1e-4)


def test_the_description_names_no_path_of_this_machine(tmp_path: Path) -> None:
    found = run.calibrate(_model(tmp_path / "anna" / "mine"), _texts(tmp_path / "anna" / "a.jsonl"), tmp_path / "out")
    text = (found.path / "statistics.json").read_text()
    assert found.about["model"]["reference"] == "mine"
    assert found.about["parts"][0]["data"][0]["file"] == "a.jsonl"
    assert "anna" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/model", "org/model"),
        ("org/model@v1+org/adapter", "org/model@v1+org/adapter"),
        ("{folder}/mine", "mine"),
        ("{folder}/mine+org/adapter", "mine+org/adapter"),
        ("{folder}/mine+{folder}/mine", "mine+mine"),
        ("{folder}/mine#task", "mine#task"),
        ("~/mine", "mine"),
        ("mine", "mine"),
    ],
)
def test_names_of_models_in_descriptions(
    reference: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "anna" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "anna")
    assert published_name(reference.format(folder=tmp_path / "anna")) == expected


def test_matrices_with_the_same_input_share_a_gram(tmp_path: Path) -> None:
    model, data = _model(tmp_path / "model"), _texts(tmp_path / "data.jsonl")
    found = merganser.calibrate(model, [data], tmp_path / "out")
    prefix = "model.layers.2"
    shared = {name: own.stored for name, own in found.tensors.items() if name.startswith(prefix)}
    groups = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    stored = [{own for name, own in shared.items() if name.split(".")[-2] in group} for group in groups]
    assert [len(names) for names in stored] == [1, 1, 1, 1]
    assert len(set.union(*stored)) == 4
    assert len([name for name in found.sums if name.startswith("gram/")]) == 16


def test_padding_and_batch_size_change_only_rounding(tmp_path: Path) -> None:
    model, data = _model(tmp_path / "model"), _texts(tmp_path / "data.jsonl")
    alone = merganser.calibrate(model, [data], tmp_path / "alone", statistics=ALL, length=30, batch_tokens=1)
    padded = merganser.calibrate(model, [data], tmp_path / "padded", statistics=ALL, length=30)
    _close(_read(padded), _read(alone))
    for name in alone.tensors:
        assert torch.equal(_read(padded)["count", name], _read(alone)["count", name])


def test_statistics_of_two_halves_add_up(tmp_path: Path) -> None:
    model = _model(tmp_path / "model", "mixtral")
    one, two = _texts(tmp_path / "one.jsonl", 1), _texts(tmp_path / "two.jsonl", 2)
    whole = merganser.calibrate(model, [one, two], tmp_path / "whole", statistics=ALL)
    halves = [
        merganser.calibrate(model, [file], tmp_path / name, statistics=ALL) for file, name in ((one, "a"), (two, "b"))
    ]
    added = merganser.add_statistics([half.path for half in halves], tmp_path / "sum")
    _close(_read(added), _read(whole))
    assert added.about["parts"] == [half.about["parts"][0] for half in halves]
    three = merganser.calibrate(model, [_texts(tmp_path / "three.jsonl", 3)], tmp_path / "c", statistics=ALL)
    assert len(merganser.add_statistics([added.path, three.path], tmp_path / "more").about["parts"]) == 3


def test_what_does_not_belong_together_is_not_added(tmp_path: Path) -> None:
    model, other = _model(tmp_path / "model"), _model(tmp_path / "other", "mistral")
    one, two = _texts(tmp_path / "one.jsonl", 1), _texts(tmp_path / "two.jsonl", 2)
    first = merganser.calibrate(model, [one], tmp_path / "a").path
    cases = {
        "another model": merganser.calibrate(other, [two], tmp_path / "b").path,
        "other statistics": merganser.calibrate(model, [two], tmp_path / "c", statistics=["magnitude"]).path,
        "would count twice": first,
    }
    for message, folder in cases.items():
        with pytest.raises(DataError, match=message):
            merganser.add_statistics([first, folder], tmp_path / "sum")
    with pytest.raises(DataError, match="two or more"):
        merganser.add_statistics([first], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


def test_the_order_of_files_does_not_matter(tmp_path: Path) -> None:
    model = _model(tmp_path / "model")
    one, two = _texts(tmp_path / "one.jsonl", 1), _texts(tmp_path / "two.jsonl", 2)
    found = [
        _read(merganser.calibrate(model, files, tmp_path / name, sequences=7, length=20))
        for name, files in (("ab", [one, two]), ("ba", [two, one]))
    ]
    for key, tensor in found[0].items():
        assert torch.equal(tensor, found[1][key])


def test_the_seed_draws_sequences(tmp_path: Path) -> None:
    model, data = _model(tmp_path / "model"), tmp_path / "data.txt"
    data.write_text(text(3, 300))
    found = [
        merganser.calibrate(model, [data], tmp_path / f"out{i}", sequences=4, length=16, seed=seed)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert [own.about["parts"][0]["counted"] for own in found] == [64, 64, 64]
    # what the model can see, where nothing is asked for
    whole = merganser.calibrate(model, [data], tmp_path / "whole")
    assert [own.about["parts"][0]["length"] for own in (*found, whole)] == [16, 16, 16, 64]
    grams = [_read(own)["gram", "model.layers.0.mlp.up_proj.weight"] for own in found]
    assert torch.equal(grams[0], grams[1])
    assert not torch.allclose(grams[0], grams[2])


def test_texts_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by every step that draws the same sequences; a changed text, choice or tokenizer is tokenised anew."""
    model, other, data = _model(tmp_path / "model"), _model(tmp_path / "other"), tmp_path / "data.txt"
    _add_template(other)
    data.write_text(text(3, 300))
    seen: list[str] = []
    whole = Tokenizer.ids_and_ends
    monkeypatch.setattr(Tokenizer, "ids_and_ends", lambda self, given: seen.append(given) or whole(self, given))  # type: ignore[func-returns-value]

    def tokenised(own: Path, **options: Any) -> int:
        before = len(seen)
        with prepare(own, [data], choice=Choice(4, 16, **options)) as found:
            assert len(found.samples) == 4
        return len(seen) - before

    assert [tokenised(model), tokenised(model), tokenised(model, seed=1), tokenised(other)] == [1, 0, 1, 1]
    data.write_text(text(4, 300))
    assert [tokenised(model), tokenised(model), seen[-1]] == [1, 0, text(4, 300)]


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _add_template(model: Path, template: str = CHAT) -> None:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))


def test_only_completions_count(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, data = _model(tmp_path / "model"), tmp_path / "data.jsonl"
    _add_template(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    pair = {"prompt": "the cat ", "completion": "sat on a mat"}
    talk = [("user", "return x"), ("assistant", "x = 1"), ("user", "and then"), ("assistant", "it was")]
    chat = {"messages": [{"role": role, "content": content} for role, content in talk]}
    data.write_text(json.dumps(pair) + "\n" + json.dumps(chat))
    found = merganser.calibrate(model, [data], tmp_path / "out", tokens="completions", statistics=["count"])

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    whole = tokenizer("the cat sat on a mat", add_special_tokens=False, return_offsets_mapping=True)
    inside = sum(end > len("the cat ") for _, end in whole["offset_mapping"])
    assert found.about["parts"][0]["counted"] == inside + count("x = 1</s>") + count("it was</s>")
    assert 0 < found.about["parts"][0]["counted"] < found.about["parts"][0]["tokens"]
    name = "model.layers.3.mlp.down_proj.weight"
    assert _read(found)["count", name].item() == found.about["parts"][0]["counted"]


def test_rows_that_do_not_count_change_nothing(tmp_path: Path) -> None:
    """The Gram of completions alone is that of all tokens less that of the prompts, which are seen alike."""
    model, data = _model(tmp_path / "model"), tmp_path / "data.jsonl"
    pairs = [{"prompt": text(i, 5), "completion": text(50 + i, 4)} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, pairs)))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"text": pair["prompt"]}) for pair in pairs))
    # texts end in a line break, so that prompts are tokenised alike with and without what follows
    whole, part, rest = (
        merganser.calibrate(model, [file], tmp_path / name, tokens=tokens)
        for name, file, tokens in (
            ("all", data, "all"),
            ("completions", data, "completions"),
            ("prompts", prompts, "all"),
        )
    )
    assert whole.about["parts"][0]["counted"] == sum(own.about["parts"][0]["counted"] for own in (part, rest))
    sums, others = _read(part), _read(rest)
    _close({key: sums[key] + others[key] for key in sums}, _read(whole))


class _Stop(BaseException):
    """As a kill: no code of ours runs after it but `finally`."""


@pytest.mark.parametrize("renamed", [False, True])
def test_a_calibration_killed_at_its_last_step(renamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = _model(tmp_path / "model", "llama"), tmp_path / "data.txt"
    data.write_text(text(0, 20))
    original = Path.rename

    def stopping(path: Path, target: Path) -> Path:
        if path.name != ".out.calibrating":
            return original(path, target)
        if renamed:
            original(path, target)
        raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopping)
        with pytest.raises(_Stop):
            merganser.calibrate(model, data, tmp_path / "out")
    if not renamed:
        merganser.calibrate(model, data, tmp_path / "out")
    assert open_statistics(tmp_path / "out").tensors
    assert not (tmp_path / ".out.calibrating").exists()


@pytest.mark.parametrize(
    ("family", "calls"), [("llama", 1), ("llama", 5), ("llama", 6), ("llama", 8), ("t5", 4), ("t5", 8), ("t5", 9)]
)
def test_a_killed_calibration_continues_at_its_block(
    family: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = _model(tmp_path / "model", family), tmp_path / "data.jsonl"
    pairs = [{"prompt": text(i, 5), "completion": text(50 + i, 4)} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, pairs)))
    options: dict[str, Any] = {"statistics": ALL, "length": 60, "batch_tokens": 60}
    whole = merganser.calibrate(model, [data], tmp_path / "whole", **options)
    parts = len(list(tmp_path.glob("whole/*.safetensors")))
    original, seen = stream.run_on_text, []

    def counting(skeleton: Any, index: int, *rest: Any) -> Any:
        seen.append(index)
        if len(seen) == calls:
            raise _Stop
        return original(skeleton, index, *rest)

    monkeypatch.setattr(stream, "run_on_text", counting)
    with pytest.raises(_Stop):
        merganser.calibrate(model, [data], tmp_path / "cut", **options)
    assert not (tmp_path / "cut").exists()
    stopped = seen[-1]
    found = merganser.calibrate(model, [data], tmp_path / "cut", **options)
    assert seen[calls] == stopped
    assert parts == (5 if family == "t5" else 4)
    assert not list(tmp_path.glob(".cut*"))
    for file in whole.path.iterdir():
        assert (found.path / file.name).read_bytes() == file.read_bytes()
    assert sorted(file.name for file in found.path.iterdir()) == sorted(file.name for file in whole.path.iterdir())


def test_other_work_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = _model(tmp_path / "model"), _texts(tmp_path / "data.jsonl")
    original = run.write_sums
    written: list[str] = []

    def failing(file: Path, sums: Any) -> None:
        written.append(file.name)
        if len(written) == 3:
            raise OutputError(f"{file}: no space left on device")
        original(file, sums)

    monkeypatch.setattr(run, "write_sums", failing)
    with pytest.raises(OutputError):
        merganser.calibrate(model, [data], tmp_path / "out", length=20)
    written.clear()
    monkeypatch.setattr(run, "write_sums", lambda file, sums: (written.append(file.name), original(file, sums))[1])
    found = merganser.calibrate(model, [data], tmp_path / "out", length=30)
    assert len(written) == 4
    plain = merganser.calibrate(model, [data], tmp_path / "plain", length=30)
    for key, tensor in _read(plain).items():
        assert torch.equal(_read(found)[key], tensor)


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    model = _model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"text": "the cat sat on a mat while it was and then the cat sat on"}\n\n{"text": "x = 1 and then it was a mat while the cat 東"}'
    )
    token = AutoTokenizer.from_pretrained(model)("東")["input_ids"][-1]
    tensors["model.embed_tokens.weight"][token] = math.inf
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NonFiniteError, match=r"data.jsonl:3: the model produces NaN or infinity .* model.layers.0"):
        merganser.calibrate(model, [data], tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_progress_tells_of_every_block(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    merganser.calibrate(
        _model(tmp_path / "model"),
        [_texts(tmp_path / "data.jsonl")],
        tmp_path / "out",
        progress=lambda done, count: told.append((done, count)),
    )
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]


def _damage(folder: Path, **changes: Any) -> None:
    file = folder / "statistics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    model, data = _model(tmp_path / "model"), _texts(tmp_path / "data.jsonl")

    def fresh(name: str) -> Path:
        return merganser.calibrate(model, [data], tmp_path / name).path

    def check(folder: Path, message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_statistics(folder)

    check(tmp_path / "nowhere", "there is no such folder")
    check(model, "is not a folder of statistics")
    kind = fresh("kind")
    _damage(kind, kind="evaluation")
    check(kind, "is not a description of statistics")
    version = fresh("version")
    _damage(version, format=99)
    check(version, "has format 99, this version reads 1")
    outside = fresh("outside")
    _damage(outside, files=["../data.jsonl"])
    check(outside, "leaves the folder")
    missing = fresh("missing")
    _damage(missing, files=["statistics-00001-of-00004.safetensors"])
    check(missing, r"of tensor 'model.layers.1.* is in none of its files")
    cut = fresh("cut")
    file = cut / "statistics-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    check(cut, "truncated")
    broken = fresh("broken")
    (broken / "statistics.json").write_text('{"kind": ')
    check(broken, "is not valid JSON")
    good = open_statistics(fresh("good"))
    with pytest.raises(
        DataError, match=r"has no 'magnitude'; it has count, gram. Calibrate again with --statistics magnitude"
    ):
        good.info("magnitude", "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(DataError, match=r"has no entry for tensor 'model.norm.weight'"):
        good.info("gram", "model.norm.weight")


def test_what_is_not_ours_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = _model(tmp_path / "model"), _texts(tmp_path / "data.jsonl")
    working = tmp_path / ".out.calibrating"
    working.mkdir()
    (working / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds 'mine.txt'"):
        merganser.calibrate(model, [data], tmp_path / "out")
    assert (working / "mine.txt").read_text() == "mine"
    (working / "mine.txt").unlink()

    def failing(file: Path, sums: Any) -> None:
        (working / "note.txt").write_text("mine")
        raise NonFiniteError("the model is damaged")

    monkeypatch.setattr(run, "write_sums", failing)
    with pytest.raises(NonFiniteError, match="the model is damaged"):
        merganser.calibrate(model, [data], tmp_path / "out")
    assert (working / "note.txt").read_text() == "mine"
