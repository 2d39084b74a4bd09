"""Plain text out of the packages, and the split into train, tune and test."""

import ast
import struct
import sys
import sysconfig
from pathlib import Path

SPLITS = ("train", "tune", "test")


def split_contiguous(text: str, tune: float = 0.08, test: float = 0.08) -> dict[str, str]:
    """Cut a text into three contiguous ranges at line ends: train first, then tune, then test.

    Neighbouring lines of these texts resemble each other, so a random hold-out would leak.

    Raises:
        ValueError: A range would be empty.
    """
    first = _line_end(text, int(len(text) * (1 - tune - test)))
    second = _line_end(text, max(first + 1, int(len(text) * (1 - test))))
    parts = dict(zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True))
    for name, part in parts.items():
        if not part.strip():
            raise ValueError(f"split: the {name} range is empty, text has {len(text)} characters; use a longer text")
    return parts


def _line_end(text: str, position: int) -> int:
    found = text.find("\n", position)
    return len(text) if found < 0 else found + 1


def split_by_id(items: list[str], tune: float = 0.1, test: float = 0.1) -> dict[str, list[str]]:
    """Cut a list of problems, ordered by id, into three contiguous ranges: train first, then tune, then test.

    Raises:
        ValueError: A range would be empty.
    """
    first = round(len(items) * (1 - tune - test))
    second = round(len(items) * (1 - test))
    parts = dict(zip(SPLITS, (items[:first], items[first:second], items[second:]), strict=True))
    for name, part in parts.items():
        if not part:
            raise ValueError(f"split: the {name} range is empty, found {len(items)} problems; use more")
    return parts


def write_splits(folder: Path, domain: str, parts: dict[str, str]) -> dict[str, Path]:
    """Write `<folder>/<domain>.<split>.txt` and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, text in parts.items():
        paths[name] = folder / f"{domain}.{name}.txt"
        paths[name].write_text(text, encoding="utf-8", newline="\n")
    return paths


def bible_text(module: str) -> str:
    """The running text of a pythonbible module: its first string; what follows is an index of verses.

    Lines are cut after full stops so that splits and windows have somewhere to begin.
    """
    begin = module.index('"""') + 3
    text = " ".join(module[begin : module.index('"""', begin)].split())
    return text.replace(". ", ".\n") + "\n"


def bible_verses(module: str) -> dict[int, str]:
    """Verse number (book, chapter, verse as BBCCCVVV, Genesis being book 1) to verse text."""
    begin = module.index('"""') + 3
    end = module.index('"""', begin)
    text = module[begin:end]
    index_begin = module.index("{", end)
    index = ast.literal_eval(module[index_begin : module.index("}", index_begin) + 1])
    starts = sorted((start, verse) for verse, start in index.items())
    ends = [start for start, _ in starts[1:]] + [len(text)]
    return {verse: " ".join(text[start:stop].split()) for (start, verse), stop in zip(starts, ends, strict=True)}


def catalogue(data: bytes) -> dict[str, str]:
    """Message and translation from a compiled gettext catalogue (.mo); plural forms keep the first."""
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, ids, translations = struct.unpack(f"{order}3I", data[8:20])

    def message(table: int, number: int) -> str:
        length, offset = struct.unpack_from(f"{order}2I", data, table + 8 * number)
        return data[offset : offset + length].split(b"\0")[0].decode("utf-8")

    pairs = {message(ids, number): message(translations, number) for number in range(count)}
    pairs.pop("", None)  # the header
    return pairs


def translated_text(catalogues: list[dict[str, str]], minimum: int = 25) -> str:
    """Translations in the order of their messages, one per paragraph, each once; labels of a word or two left out."""
    merged = sorted(pair for part in catalogues for pair in part.items())
    kept = dict.fromkeys(
        translation.strip()
        for message, translation in merged
        if len(translation) >= minimum and translation.strip() != message.strip()
    )
    return "\n\n".join(kept) + "\n"


def python_source(limit: int) -> str:
    """Top-level modules of the running interpreter's standard library, in alphabetical order.

    Raises:
        FileNotFoundError: The interpreter comes without its sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    if len(text) < limit:
        raise FileNotFoundError(
            f"{folder}: {len(text)} characters of Python found, {limit} are needed. "
            "Use an interpreter that ships its standard library as source"
        )
    # whole modules spread over the alphabet, not the first ones only
    step = max(1, int(len(text) / limit))
    chosen = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files[::step])
    return chosen[: _line_end(chosen, limit)]


def python_docs() -> str:
    """The English language reference that ships with the interpreter for `help()`."""
    folder = Path(sysconfig.get_path("stdlib"))
    tree = ast.parse((folder / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(text for text in strings if len(text) > 500)


def interpreter_record() -> dict[str, str]:
    """What zoo.json says of the texts that come with the interpreter."""
    return {
        "package": f"CPython {sys.version.split()[0]} standard library",
        "licence": "PSF-2.0",
        "use": "python (sources), english (reference texts of help())",
    }
