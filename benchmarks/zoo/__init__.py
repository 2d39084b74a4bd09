"""Zoos of small language models to merge: one base, experts fine-tuned from it, held-out texts per domain.

python -m benchmarks.zoo tiny

zoo = load_zoo("tiny")
held_out_loss(zoo.experts["french"], zoo.texts["french"]["test"], max_tokens=4096).bits_per_byte
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from .loss import Loss, held_out_loss
from .sources import cache_folder

__all__ = ["ZOOS", "Loss", "Zoo", "default_folder", "held_out_loss", "load_zoo"]

ZOOS = ("tiny", "real")


@dataclass(frozen=True)
class Zoo:
    """Where the parts of a zoo lie.

    `texts` maps a domain to its splits train, tune and test; `retained` names the domain of `texts` that belongs
    to the base and to no expert. `adapters` are LoRA folders; `pair` are two experts whose data conflict.
    """

    folder: Path
    base: Path
    experts: dict[str, Path]
    texts: dict[str, dict[str, Path]]
    retained: str
    adapters: dict[str, Path] = field(default_factory=dict)
    pair: dict[str, Path] = field(default_factory=dict)


def default_folder(name: str) -> Path:
    """Where a zoo lies unless it was made elsewhere."""
    return cache_folder() / "zoo" / name


def load_zoo(name: str, folder: Path | None = None, *, experts: Collection[str] | None = None) -> Zoo:
    """Open a zoo that `python -m benchmarks.zoo NAME` has made.

    Args:
        name: "tiny" or "real".
        folder: Where it lies.
        experts: Those that are needed; by default everything is, adapters and the pair, too.

    Raises:
        ValueError: No zoo has this name.
        FileNotFoundError: The zoo was not made yet, or not to the end.
    """
    if name not in ZOOS:
        raise ValueError(f"zoo: no zoo is named {name!r}, there are: {', '.join(ZOOS)}")
    folder = folder or default_folder(name)
    book = folder / "zoo.json"
    if not book.exists():
        raise FileNotFoundError(f"{book}: not found. Make the zoo first: python -m benchmarks.zoo {name}")
    content = json.loads(book.read_text(encoding="utf-8"))

    def paths(key: str) -> dict[str, Path]:
        return {domain: folder / path for domain, path in content.get(key, {}).items()}

    zoo = Zoo(
        folder=folder,
        base=folder / content["base"],
        experts=paths("experts"),
        texts={d: {split: folder / path for split, path in splits.items()} for d, splits in content["texts"].items()},
        retained=content["retained"],
        adapters=paths("adapters"),
        pair=paths("pair"),
    )
    needed = [zoo.base, *(path for domain, path in zoo.experts.items() if experts is None or domain in experts)]
    if experts is None:
        needed += [*zoo.adapters.values(), *zoo.pair.values()]
    for path in needed:
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: not made yet. Finish the zoo: python -m benchmarks.zoo {name}")
    return zoo
