"""The real zoo: SmolLM2-135M-Instruct, eight full fine-tunes, four LoRA adapters and a conflicting pair."""

import dataclasses
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import real_texts, sources, texts
from .book import Book
from .jobs import Job, workers
from .real_training import SMOLLM2, LoraSettings, make_base, tokenize, train_full, train_lora
from .sources import SourceError
from .tiny import ENGLISH, MIDDLE_ENGLISH
from .training import Settings

RETAINED = "english"
PAIR = ("basic", "wycliffe")
BASE_WORK = 10_000  # training tokens that cost as much as making the base


def _full(seed: int, learning_rate: float = 1e-4) -> Settings:
    return Settings(steps=120, learning_rate=learning_rate, batch=8, length=128, warmup=10, weight_decay=0.0, seed=seed)


def _lora(seed: int, learning_rate: float = 1e-3) -> LoraSettings:
    return LoraSettings(
        steps=120, learning_rate=learning_rate, batch=8, length=128, warmup=10, weight_decay=0.0, seed=seed
    )


MODELS: dict[str, Settings] = {
    "experts/french": _full(21),
    "experts/german": _full(22),
    "experts/russian": _full(23),
    "experts/maths": _full(24, 5e-5),
    "experts/haskell": _full(25),
    "experts/middle_english": _full(26),
    "experts/proofs": _full(27),
    "experts/medicine": _full(28),
    "adapters/maths": _lora(32, 5e-4),
    "adapters/haskell": _lora(33),
    "adapters/middle_english": _lora(34),
    "adapters/medicine": _lora(35),
    "pair/basic": _full(41),
    "pair/wycliffe": _full(42),
}
# texts of the pair are named pair_basic and pair_wycliffe; those of experts and adapters by their domain


def domain_of(model: str) -> str:
    """The text domain that a model of the zoo was trained on."""
    kind, name = model.split("/")
    return f"pair_{name}" if kind == "pair" else name


def collect(domain: str) -> dict[str, str]:
    """The text of one domain, split.

    Raises:
        SourceError: A package cannot be had.
    """
    if domain in real_texts.HELP:
        return real_texts.help_pages(domain)
    if domain.startswith("pair_"):
        modules = (real_texts.bible(package) for package in (ENGLISH, real_texts.BASIC_ENGLISH, MIDDLE_ENGLISH))
        return dict(zip(PAIR, real_texts.conflicting_pair(*modules), strict=True))[domain.removeprefix("pair_")]
    if domain == "middle_english":
        return texts.split_contiguous(texts.bible_text(real_texts.bible(MIDDLE_ENGLISH))[: real_texts.LIMIT])
    make: dict[str, Callable[[], dict[str, str]]] = {
        "maths": real_texts.maths,
        "haskell": real_texts.haskell,
        "medicine": real_texts.medicine,
        "proofs": real_texts.proofs,
        RETAINED: real_texts.english,
    }
    return make[domain]()


def make(folder: Path, threads: int = 2, only: list[str] | None = None, steps: int | None = None) -> Path:
    """Make what is missing of the real zoo in `folder` and return the path of its zoo.json.

    Args:
        folder: Where the zoo lies or shall lie.
        threads: Worker processes, one thread and about 3 GB of memory each.
        only: Names of models, such as experts/french; all when not given.
        steps: Training steps instead of the published number, for trials. Models made with another number count
            as not made.

    Raises:
        ValueError: `only` names a model that the zoo does not have.
        SourceError: A package cannot be had.
    """
    start = time.monotonic()
    models = _chosen(only, steps)
    folder.mkdir(parents=True, exist_ok=True)
    book = Book(folder, "real")
    domains = sorted({domain_of(model) for model in models} | {RETAINED})
    paths = {domain: texts.write_splits(folder / "texts", domain, collect(domain)) for domain in domains}
    base = {"package": SMOLLM2.record()}
    settings = {"base": base} | {model: _settings(base, models[model], paths[domain_of(model)]) for model in models}
    missing = [name for name in settings if not book.finished(name, settings[name])]
    if "base" in missing:
        missing = list(settings)
    _describe(book, paths, settings, missing)
    print(f"real zoo in {folder}: to make: {', '.join(missing) or 'nothing, all models are there'}", flush=True)
    if missing:
        _train(book, models, settings, paths, missing, threads)
    print(f"real zoo complete after {time.monotonic() - start:.0f} s: {folder / 'zoo.json'}")
    return folder / "zoo.json"


def _chosen(only: list[str] | None, steps: int | None) -> dict[str, Settings]:
    for name in only or ():
        if name not in MODELS:
            raise ValueError(f"--only: the real zoo has no model {name!r}, it has: {', '.join(MODELS)}")
    chosen = {name: settings for name, settings in MODELS.items() if not only or name in only}
    if steps is not None:
        chosen = {name: dataclasses.replace(settings, steps=steps) for name, settings in chosen.items()}
    return chosen


def _settings(base: dict[str, Any], training: Settings, paths: dict[str, Path]) -> dict[str, Any]:
    """Everything a model depends on."""
    return {
        "base": base,
        "method": "lora" if isinstance(training, LoraSettings) else "full",
        "training": training.record(),
        "text_sha256": sources.sha256(paths["train"]),
    }


def _describe(book: Book, paths: dict[str, Any], settings: dict[str, Any], missing: list[str]) -> None:
    """Write what the zoo holds: models of this call, and those of earlier calls that are still whole."""
    kinds: dict[str, dict[str, str]] = {"experts": {}, "adapters": {}, "pair": {}}
    earlier = (name for name, entry in book.content["models"].items() if book.finished(name, entry["settings"]))
    for name in sorted({*settings, *earlier} - {"base"}):
        kind, short = name.split("/")
        kinds[kind][short] = name
    debs = (*real_texts.HELP.values(), real_texts.ENGLISH_HELP, real_texts.PROOFS)
    unpacked = [(deb, sources.cache_folder() / "downloads" / f"deb-{deb.name}") for deb in debs]
    book.content |= kinds | {
        "base": "base",
        "retained": RETAINED,
        "texts": book.content.get("texts", {})
        | {
            domain: {name: str(path.relative_to(book.folder)) for name, path in split.items()}
            for domain, split in paths.items()
        },
        "text_sha256": {path.name: sources.sha256(path) for path in sorted((book.folder / "texts").iterdir())},
        "sources": [
            *(
                package.record()
                for package in (SMOLLM2, real_texts.PROBLEMS, ENGLISH, real_texts.BASIC_ENGLISH, MIDDLE_ENGLISH)
            ),
            *(sources.deb_record(deb, path) for deb, path in unpacked if path.exists()),
        ],
        "software": {"python": platform.python_version(), **_versions()},
    }
    book.save()


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "tokenizers", "gguf", "peft", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name in ("gguf", "accelerate", "peft"):
                raise SourceError(
                    f"{name}: not installed. The real zoo needs: pip install gguf accelerate peft"
                ) from None
            raise
    return found


def _train(
    book: Book,
    models: dict[str, Settings],
    settings: dict[str, Any],
    paths: dict[str, dict[str, Path]],
    missing: list[str],
    threads: int,
) -> None:
    folder = book.folder
    wanted = [name for name in missing if name != "base"]
    work = sum(models[name].tokens for name in wanted) + BASE_WORK * ("base" in missing)

    def finished(name: str, times: dict[str, float]) -> None:
        book.add(name, settings[name], times)

    with workers(threads, work) as pool:
        if "base" in missing:
            pool.run([Job("base", BASE_WORK, make_base, (folder / "base",))], finished)
        tokens = {}
        for domain in sorted({domain_of(name) for name in wanted}):
            tokens[domain] = folder / "tokens" / f"{domain}.npy"
            tokenize(folder / "base", paths[domain]["train"], tokens[domain])
        jobs = []
        for name in wanted:
            training = models[name]
            function = train_lora if isinstance(training, LoraSettings) else train_full
            arguments = (folder / name, folder / "base", tokens[domain_of(name)], training)
            jobs.append(Job(name, training.tokens, function, arguments))
        pool.run(jobs, finished)
