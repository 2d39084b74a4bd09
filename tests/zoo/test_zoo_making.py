import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.zoo import held_out_loss, load_zoo, sources, tiny, training
from benchmarks.zoo.book import Book, appears_whole, settings_hash


def test_settings_hash_depends_on_values_not_on_order() -> None:
    assert settings_hash({"a": 1, "b": {"c": 2.0}}) == settings_hash({"b": {"c": 2.0}, "a": 1})
    assert settings_hash({"a": 1}) != settings_hash({"a": 2})


@pytest.fixture
def book(tmp_path: Path) -> Book:
    (tmp_path / "experts" / "french").mkdir(parents=True)
    (tmp_path / "experts" / "french" / "model.safetensors").write_bytes(b"weights")
    book = Book(tmp_path, "tiny")
    book.add("experts/french", {"steps": 3}, {"seconds": 1.0})
    return book


def test_a_finished_model_is_not_made_again(book: Book) -> None:
    again = Book(book.folder, "tiny")
    assert again.finished("experts/french", {"steps": 3})
    entry = json.loads((book.folder / "zoo.json").read_text())["models"]["experts/french"]
    assert entry["files"] == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}


def test_other_settings_or_a_changed_file_make_it_again(book: Book) -> None:
    again = Book(book.folder, "tiny")
    assert not again.finished("experts/french", {"steps": 4})
    assert not again.finished("base", {"steps": 3})
    (book.folder / "experts" / "french" / "model.safetensors").write_bytes(b"weightz")
    assert not again.finished("experts/french", {"steps": 3})


def test_another_zoo_in_the_folder_counts_for_nothing(book: Book) -> None:
    assert not Book(book.folder, "real").finished("experts/french", {"steps": 3})


def test_an_expert_is_made_again_when_its_base_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "french.txt").write_text("texte")
    paths = {"french": {"train": tmp_path / "french.txt"}}
    before = tiny._settings(tmp_path, paths)
    monkeypatch.setattr(tiny, "BASE", training.Settings(steps=1, learning_rate=1.0))
    after = tiny._settings(tmp_path, paths)
    for model in before:
        assert settings_hash(before[model]) != settings_hash(after[model])


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "base"

    def interrupted() -> None:
        with appears_whole(target) as folder:
            (folder / "a").write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert not target.exists()
    with appears_whole(target) as folder:
        (folder / "b").write_text("whole")
    assert [path.name for path in target.iterdir()] == ["b"]


def wheel(folder: Path) -> sources.Package:
    path = folder / "thing-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/data.txt", "text")
    return sources.Package("thing", "1", path.name, sources.sha256(path), "CC0", "test")


def test_a_cached_wheel_is_read_without_a_download(tmp_path: Path) -> None:
    package = wheel(tmp_path)
    path = sources.fetch(package, tmp_path)
    assert sources.read_member(path, "thing/data.txt") == b"text"
    with pytest.raises(sources.SourceError, match=r"has no file thing/other\.txt"):
        sources.read_member(path, "thing/other.txt")


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    package = wheel(tmp_path)
    (tmp_path / package.file).write_bytes(b"something else")
    with pytest.raises(sources.SourceError, match=f"expected {package.sha256}"):
        sources.check_hash(tmp_path / package.file, package.sha256)


def test_a_download_that_fails_names_the_package_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    package = sources.Package("merganser-no-such-package", "1", "x.whl", "0", "none", "test")
    with pytest.raises(sources.SourceError, match=r"merganser-no-such-package==1: could not be downloaded .* by hand"):
        sources.fetch(package, tmp_path)


def test_load_zoo_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.zoo tiny"):
        load_zoo("tiny", tmp_path)
    with pytest.raises(ValueError, match="no zoo is named 'big'"):
        load_zoo("big", tmp_path)


def test_both_shards_together_are_the_whole_batch() -> None:
    settings = training.Settings(steps=2, learning_rate=1e-3, batch=4, length=8)
    streams = [(np.arange(200, dtype=np.uint16), 0.5), (np.arange(300, 600, dtype=np.uint16), 0.5)]
    whole = list(training.batches(streams, settings, 0, 1))
    halves = [list(training.batches(streams, settings, shard, 2)) for shard in (0, 1)]
    for step in range(2):
        assert whole[step].shape == (4, 9)
        assert torch.equal(whole[step], torch.cat([halves[0][step], halves[1][step]]))


ARCHITECTURE = tiny.ARCHITECTURE | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro base after two steps, with its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("micro")
    text = "the quick brown fox jumps over the lazy dog\n" * 60
    tokenizer = tiny.make_tokenizer({"english": {"train": text}}, folder / "tokenizer")
    np.save(folder / "english.npy", np.array(tokenizer.encode(text).ids, dtype=np.uint16))
    (folder / "english.txt").write_text(text + "le garçon déçu\n")
    train_micro(folder, folder / "base")
    return folder


def train_micro(folder: Path, target: Path) -> None:
    settings = training.Settings(steps=2, learning_rate=1e-2, batch=4, length=16, warmup=1)
    streams = [(folder / "english.npy", 1.0)]
    tokenizer = folder / "tokenizer"
    training.train_base(lambda *_: None, target, ARCHITECTURE, tokenizer, streams, settings, [0, 1], None)


def test_two_steps_give_a_checkpoint_that_loads(micro: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(micro / "base")
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(micro / "base")
    assert tokenizer.decode(tokenizer("le garçon déçu")["input_ids"]) == "le garçon déçu"


def test_the_same_seed_gives_the_same_bytes(micro: Path) -> None:
    train_micro(micro, micro / "again")
    assert sources.sha256(micro / "again" / "model.safetensors") == sources.sha256(micro / "base" / "model.safetensors")


def test_an_expert_moves_from_its_base(micro: Path) -> None:
    from safetensors.torch import load_file

    settings = training.Settings(steps=2, learning_rate=1e-2, batch=4, length=16, warmup=1)
    training.train_expert(
        lambda *_: None, micro / "expert", micro / "base", micro / "tokenizer", [(micro / "english.npy", 1.0)], settings
    )
    base, expert = load_file(micro / "base/model.safetensors"), load_file(micro / "expert/model.safetensors")
    assert base.keys() == expert.keys()
    assert not torch.equal(base["model.embed_tokens.weight"], expert["model.embed_tokens.weight"])
    before = held_out_loss(micro / "base", micro / "english.txt", 200, window=16)
    after = held_out_loss(micro / "expert", micro / "english.txt", 200, window=16)
    assert after.nats_per_token < before.nats_per_token


@pytest.mark.parametrize("window", [16, 37])
def test_held_out_loss_equals_a_token_by_token_sum(micro: Path, window: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (micro / "english.txt").read_text()[-120:]
    (micro / "short.txt").write_text(text)
    model = AutoModelForCausalLM.from_pretrained(micro / "base", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(micro / "base")(text)["input_ids"]
    nats = 0.0
    for position in range(1, len(ids)):
        start = (position - 1) // window * window
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:position]])).logits[0, -1]
        nats -= torch.log_softmax(logits.double(), 0)[ids[position]].item()
    loss = held_out_loss(micro / "base", micro / "short.txt", window=window)
    assert loss.tokens == len(ids) - 1
    assert loss.nats_per_token == pytest.approx(nats / loss.tokens, rel=1e-5)
    assert loss.bytes == len(text.encode()) - 1  # the first token is one letter
    assert loss.bits_per_byte == pytest.approx(nats / np.log(2) / loss.bytes, rel=1e-5)


def test_held_out_loss_refuses_a_text_without_a_prediction(micro: Path) -> None:
    (micro / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt: needs at least 2 tokens, has 0"):
        held_out_loss(micro / "base", micro / "empty.txt")
