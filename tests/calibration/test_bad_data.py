"""Data that cannot be used: one message, exit code 2, and nothing is left."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import merganser
from merganser.cli import main
from merganser.errors import DataError, MergeError, OutputError, UnsupportedError
from tests.calibration.families import save
from tests.calibration.test_calibrate import CHAT, _add_template
from tests.evaluation.tiny import add_tokenizer, text

GOOD = '{"text": "the cat sat on a mat"}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("models") / "model", "llama")
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("models") / "chat", "llama")
    add_tokenizer(folder)
    _add_template(folder, "{% if messages[0]['role'] == 'robot' %}{{ raise_exception('who?') }}{% endif %}" + CHAT)
    return folder


def _file(name: str, content: str | bytes) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [path]

    return make


def _lines(*lines: Any) -> Callable[[Path], list[Path]]:
    return _file("d.jsonl", "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


def _folder(folder: Path) -> list[Path]:
    (folder / "d.jsonl").mkdir()
    return [folder / "d.jsonl"]


def _pipe(folder: Path) -> list[Path]:
    os.mkfifo(folder / "d.jsonl")
    return [folder / "d.jsonl"]


def _misspelt(folder: Path) -> list[Path]:
    (folder / "texts.jsonl").write_text(GOOD)
    return [folder / "text.jsonl"]


def _dangling(folder: Path) -> list[Path]:
    (folder / "d.jsonl").symlink_to("gone.jsonl")
    return [folder / "d.jsonl"]


def _twice(folder: Path) -> list[Path]:
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text(GOOD)
    return [folder / "a.jsonl", folder / "b.jsonl"]


BAD: dict[str, tuple[Callable[[Path], list[Path]], str]] = {
    "nothing given": (lambda folder: [], "data: no file given; give .txt"),
    "missing": (lambda folder: [folder / "d.jsonl"], "d.jsonl: there is no such file"),
    "misspelt name": (_misspelt, "text.jsonl: there is no such file. Did you mean 'texts.jsonl'?"),
    "below a file": (lambda folder: [_misspelt(folder)[0].with_name("texts.jsonl") / "x.txt"], "there is no such file"),
    "a link to nothing": (_dangling, "d.jsonl: is a link to gone.jsonl, which does not exist"),
    "folder": (_folder, "d.jsonl: is a folder; give the files in it"),
    "pipe": (_pipe, "d.jsonl: is not a file but a pipe or a device"),
    "NUL in the name": (lambda folder: [folder / "a\0.txt"], "is not the name of a file"),
    "twice": (_twice, "holds the same as"),
    "unknown suffix": (_file("d.csv", "a,b"), "d.csv: what a .csv file holds is not known; known are .txt"),
    "no suffix": (_file("data", "text"), "data: what a file without a suffix holds is not known"),
    "empty": (_file("d.jsonl", ""), "d.jsonl: is empty"),
    "empty text": (_file("d.txt", ""), "d.txt: is empty"),
    "blank lines": (_file("d.jsonl", "\n \n\n"), "d.jsonl: is empty"),
    "only a byte order mark": (_file("d.txt", b"\xef\xbb\xbf \n"), "d.txt: is empty"),
    "Git LFS pointer": (_file("d.txt", "version https://git-lfs\noid sha256:0\n"), "is a Git LFS pointer"),
    "not UTF-8": (_file("d.jsonl", GOOD.encode() + b"\n\xff\xfe"), "d.jsonl:2: is not UTF-8 text (byte 33)"),
    "UTF-16": (_file("d.txt", GOOD.encode("utf-16")), "d.txt:1: is not UTF-8 text"),
    "broken JSON": (_lines(GOOD, '{"text": "a'), "d.jsonl:2: is not JSON: Unterminated string"),
    "two objects in a line": (_lines(GOOD + GOOD), "d.jsonl:1: is not JSON: Extra data"),
    "one JSON list": (_lines([json.loads(GOOD)]), "d.jsonl:1: must be an object with text"),
    "deeply nested": (_lines("[" * 100_000), "d.jsonl:1: is not JSON: it is nested too deeply"),
    "a huge number": (
        _lines('{"text": ' + "9" * 5000 + "}"),
        "d.jsonl:1: is not JSON: it is nested too deeply, or has a huge",
    ),
    "a number": (_lines(GOOD, 3), "d.jsonl:2: must be an object with text"),
    "no key": (_lines({}), "has neither text, or prompt and completion, or messages. Found: nothing"),
    "other keys": (_lines({"input": "a"}), "d.jsonl:1: has neither text, or prompt"),
    "misspelt key": (_lines({"txt": "a"}), "Is 'txt' meant to be 'text'? Found: 'txt'"),
    "two forms": (_lines({"text": "a", "messages": []}), "has 'text' and 'messages', and only one"),
    "text is not text": (_lines({"text": ["a"]}), "d.jsonl:1: text must be a text, found ['a']"),
    "text is null": (_lines({"text": None}), "d.jsonl:1: text must be a text, found None"),
    "text is blank": (_lines(GOOD, {"text": " "}), "d.jsonl:2: text is empty"),
    "half a letter": (_lines('{"text": "\\ud800"}'), "d.jsonl:1: text holds half of a surrogate pair"),
    "prompt alone": (_lines({"prompt": "a"}), "d.jsonl:1: 'completion' is missing; found: 'prompt'"),
    "completion alone": (_lines({"completion": "a"}), "d.jsonl:1: 'prompt' is missing; found: 'completion'"),
    "empty completion": (_lines({"prompt": "a", "completion": ""}), "d.jsonl:1: completion is empty"),
    "prompt is not text": (_lines({"prompt": 1, "completion": "a"}), "d.jsonl:1: prompt must be a text"),
    "a line break in messages": (_lines({"messages": "a\nb"}), "with role and content, found 'a\\nb'"),
    "a key twice": (
        _lines('{"text": "a", "text": "b"}'),
        "d.jsonl:1: has 'text' twice, and only one of them can be meant",
    ),
    "many keys": (_lines({f"k{i}": i for i in range(5000)}), "'k7', and 4992 more"),
    "a huge key": (_lines({"x" * 9000: 1}), "Found: 'xxxxxxxxxxxxxxxx"),
    "messages are no list": (_lines({"messages": "hi"}), "d.jsonl:1: messages must be a list of objects"),
    "no messages": (_lines({"messages": []}), "d.jsonl:1: messages must be a list of objects"),
    "a message is not an object": (_lines({"messages": ["hi"]}), "message 1: must be an object with role and content"),
    "no role": (_lines({"messages": [{"rol": "user", "content": "a"}]}), "Is 'rol' meant to be 'role'?"),
    "no content": (_lines({"messages": [{"role": "user"}]}), "message 1: 'content' is missing. Found: 'role'"),
    "content is a list": (
        _lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        "message 1: content must be a text",
    ),
    "no chat template": (
        _lines({"messages": [{"role": "user", "content": "a"}]}),
        "d.jsonl:1: the model's tokenizer has no chat template, which messages need",
    ),
    "not Parquet, or nothing to read it": (_file("d.parquet", "PAR0 but no more"), "d.parquet: "),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_ends_in_one_message(kind: str, model: Path, tmp_path: Path) -> None:
    make, message = BAD[kind]
    files = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((DataError, UnsupportedError), match=re.escape(message)) as found:
        merganser.calibrate(model, files, tmp_path / "out")
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 600
    assert sorted(tmp_path.iterdir()) == before


OPTIONS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "fewer than asked": (
        _lines(GOOD),
        {"sequences": 2},
        "sequences: 2 of at most 64 tokens are asked for, the data have 1",
    ),
    "none": (_lines(GOOD), {"sequences": 0}, "sequences: must be at least 1, found 0"),
    "too long": (_lines(GOOD), {"length": 65}, "length: 65 tokens, but the model sees at most 64 at once"),
    "too short": (_lines(GOOD), {"length": 1}, "length: must be at least 2 tokens, found 1"),
    "seed": (_lines(GOOD), {"seed": -1}, "seed: must be at least 0, found -1"),
    "which tokens": (_lines(GOOD), {"tokens": "some"}, "tokens: must be all or completions, found 'some'"),
    "no completion": (_lines(GOOD), {"tokens": "completions"}, "d.jsonl:1: is a plain text and has no completion"),
    "statistic": (_lines(GOOD), {"statistics": ["grams"]}, "unknown statistic 'grams'. Did you mean 'gram'?"),
    "no statistics": (_lines(GOOD), {"statistics": []}, "statistics: none given; give some of count, magnitude"),
    "half a sequence": (_lines(GOOD), {"sequences": 1.5}, "sequences: must be a whole number, found 1.5"),
    "length is a text": (_lines(GOOD), {"length": "16"}, "length: must be a whole number, found '16'"),
    "batch": (_lines(GOOD), {"batch_tokens": 0}, "batch_tokens: must be at least 1, found 0"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_bad_options_end_in_one_message(kind: str, model: Path, tmp_path: Path) -> None:
    make, options, message = OPTIONS[kind]
    files = make(tmp_path)
    with pytest.raises(DataError, match=re.escape(message)):
        merganser.calibrate(model, files, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == files


CHATS: dict[str, tuple[list[dict[str, str]], str]] = {
    "refused": ([{"role": "robot", "content": "a"}], "d.jsonl:1: the model's chat template refuses the messages: who?"),
    "nobody answers": ([{"role": "user", "content": "a"}], "no token in the data counts"),
}


def test_an_empty_name_is_no_folder(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data: the name of a file is empty; give \.txt"):
        merganser.calibrate(model, [""], tmp_path / "out")


@pytest.mark.parametrize("kind", CHATS)
def test_bad_conversations_end_in_one_message(kind: str, chat_model: Path, tmp_path: Path) -> None:
    messages, message = CHATS[kind]
    files = _lines({"messages": messages})(tmp_path)
    with pytest.raises(DataError, match=re.escape(message)):
        merganser.calibrate(chat_model, files, tmp_path / "out", tokens="completions")
    assert sorted(tmp_path.iterdir()) == files


def test_a_template_that_rewrites_what_was_said_tells_no_completions(model: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    add_tokenizer(folder)
    _add_template(folder, "{{ messages | length }} said: " + CHAT)
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    files = _lines({"messages": talk})(tmp_path)
    with pytest.raises(
        DataError, match=r"message 2: the model's chat template changes earlier messages when one is added"
    ):
        merganser.calibrate(folder, files, tmp_path / "out", tokens="completions")
    assert merganser.calibrate(folder, files, tmp_path / "out").tensors


def test_an_encoder_decoder_needs_pairs(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "t5")
    add_tokenizer(folder)
    with pytest.raises(
        DataError, match=r"d.jsonl:1: the model is an encoder-decoder, which needs prompt and completion"
    ):
        merganser.calibrate(folder, _lines(GOOD)(tmp_path), tmp_path / "out")
    pairs = _lines({"prompt": "a cat", "completion": "sat"})(tmp_path)
    with pytest.raises(DataError, match="tokens: of an encoder-decoder every token counts, those of the prompt too"):
        merganser.calibrate(folder, pairs, tmp_path / "out", tokens="completions")


def test_bad_models_and_targets_end_in_one_message(model: Path, tmp_path: Path) -> None:
    files = _lines(GOOD)(tmp_path)
    bare = save(tmp_path / "bare", "llama")
    other = save(tmp_path / "other", "llama")
    add_tokenizer(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[Path, Path, type[MergeError], str]] = [
        (bare, tmp_path / "out", MergeError, "has no tokenizer"),
        (tmp_path / "nowhere", tmp_path / "out", MergeError, "not found"),
        (other, tmp_path / "out", MergeError, "transformers cannot read config.json"),
        (model, tmp_path / "full", OutputError, "exists; choose another folder, or remove it"),
        (model, tmp_path / "link", OutputError, "exists; choose another folder"),
        (model, files[0], OutputError, "exists; choose another folder"),
        (model, files[0] / "out", OutputError, "cannot be written"),
    ]
    for folder, out, kind, message in cases:
        with pytest.raises(kind, match=message):
            merganser.calibrate(folder, files, out)
        assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def _run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_command_writes_statistics(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(text(ord(name), 60))
    options = ["--statistics", "gram,magnitude", "--sequences", 3, "--length", 20, "--seed", 1]
    command = [
        "calibrate",
        model,
        "--data",
        tmp_path / "a.txt",
        tmp_path / "b.txt",
        "--out",
        tmp_path / "out",
        *options,
    ]
    assert _run(*command) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("count, magnitude, gram · 28 tensors · 3 sequences · 60 tokens · ")
    assert f"wrote {tmp_path / 'out'} (" in shown
    assert _run(*command) == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path / 'out'}: exists; choose another folder, or remove it\n"


def test_the_command_ends_bad_data_with_2(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = _lines({"txt": "a"})(tmp_path)
    assert _run("calibrate", model, "--data", *files, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 1
    assert "Is 'txt' meant to be 'text'?" in captured.err
    assert sorted(tmp_path.iterdir()) == files


def test_parquet_that_is_ambiguous_or_no_text(model: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    twice = arrow.Table.from_arrays([arrow.array(["a"]), arrow.array(["b"])], names=["text", "text"])
    offsets = arrow.array([0, 2], arrow.int32()).buffers()[1]
    letters = arrow.Array.from_buffers(arrow.string(), 1, [None, offsets, arrow.py_buffer(b"\xff\xfe")])
    for table, message in (
        (twice, "has 'text' twice"),
        (arrow.table({"text": letters}), "is not a Parquet file, or damaged"),
    ):
        parquet.write_table(table, tmp_path / "d.parquet")
        with pytest.raises(DataError, match=message):
            merganser.calibrate(model, tmp_path / "d.parquet", tmp_path / "out")


def test_a_template_sees_all_that_is_said_of_a_message(model: Path, tmp_path: Path) -> None:
    """Calls of tools and reasoning are keys of their own, and a table has null where a message has none."""
    folder = save(tmp_path / "model", "llama")
    add_tokenizer(folder)
    _add_template(
        folder,
        "{% for m in messages %}{{ m.content }}{% if m.calls is defined %} calls {{ m.calls }}{% endif %}{% endfor %}",
    )
    message = {"role": "user", "content": "a cat"}
    found = {}
    for name, calls in (("none", {}), ("null", {"calls": None}), ("one", {"calls": "the dog on a mat"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": [{**message, **calls}]}))
        about = merganser.calibrate(folder, tmp_path / f"{name}.jsonl", tmp_path / name, statistics="count").about
        found[name] = about["parts"][0]["tokens"]
    assert found["none"] == found["null"] < found["one"]


def test_names_of_files_in_capitals(model: Path, tmp_path: Path) -> None:
    (tmp_path / "D.JSONL").write_text(GOOD)
    assert merganser.calibrate(model, tmp_path / "D.JSONL", tmp_path / "out").tensors
