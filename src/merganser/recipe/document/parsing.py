"""Read YAML safely: line numbers are kept; only strings, numbers, booleans, nulls, lists and mappings are built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from ...errors import RecipeError
from .place import Node, Place
from .reading import MAX_BYTES, read_text, shown_path
from .scalar import FLOAT, Scalar, finite, read_scalar, shown, why_no_text

MAX_NODES = 100_000
MAX_DEPTH = 64
MAX_KEY = 200

_CORE = "tag:yaml.org,2002:"
_TAGS = {"str": str, "int": int, "float": (int, float), "bool": bool, "null": type(None), "seq": list, "map": dict}
_LOADER = cast(type[yaml.SafeLoader], getattr(yaml, "CSafeLoader", yaml.SafeLoader))


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML would read as a number."""


_Dumper.add_implicit_resolver(f"{_CORE}float", FLOAT, list("-+.0123456789"))


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document: its root node, and its text as written."""

    root: Node
    file: str
    text: str


def parse_text(text: str, file: str) -> list[Document]:
    """Parse the documents of a YAML text; documents without content are left out.

    Args:
        text: The YAML text.
        file: Name of the file for messages.

    Raises:
        RecipeError: The text is not YAML, or uses what recipes may not: object tags, more than 100,000 values
            (aliases count each time they are used), more than 64 levels, the same key twice.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{file}: a recipe may have {MAX_BYTES:,} characters at most")
    mark = text.find("\n\ufeff")
    if mark >= 0:
        where = Place(file, text.count("\n", 0, mark) + 2, "")
        raise RecipeError(f"{where}: a byte-order mark inside the text, as of two files put together; remove it")
    builder = _Builder(file)
    starts: list[int] = []
    roots: list[Node] = []
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.DocumentStartEvent):
                starts.append(event.start_mark.line if event.start_mark else 0)
            root = builder.take(event)
            if root is not None:
                roots.append(root)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RecipeError(f"{Place(file, line, '')}: not valid YAML: a character that is not allowed") from None
    except UnicodeEncodeError as error:
        line = text[: error.start].count("\n") + 1
        raise RecipeError(f"{Place(file, line, '')}: not valid YAML: half a surrogate pair") from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, file) from None
    lines = text.splitlines(keepends=True)
    # a comment above the first "---" belongs to the first document
    cuts = [0, *starts[1:], len(lines)]
    return [
        Document(root, file, "".join(lines[cuts[i] : cuts[i + 1]]))
        for i, root in enumerate(roots)
        if root.value is not None
    ]


def _syntax_error(error: yaml.MarkedYAMLError, text: str, file: str) -> RecipeError:
    mark, start = error.problem_mark or error.context_mark, error.context_mark
    line = mark.line + 1 if mark else 0
    problem = error.problem or error.context
    if line and text.splitlines()[line - 1 : line] and text.splitlines()[line - 1].lstrip(" ").startswith("\t"):
        problem = "a tab cannot indent a line; use spaces"
    elif start and error.problem and start.line + 1 != line:
        problem = f"{error.problem} {error.context}, which starts in line {start.line + 1}"
    elif "escape" in str(error.problem):
        problem = f"{error.problem}: in double quotes a backslash starts an escape; use single quotes, or '/' in a path"
    return RecipeError(f"{Place(file, line, '')}: not valid YAML: {problem}")


def parse_mapping(value: Mapping[Any, Any], file: str) -> Document:
    """Build a document from a recipe that is a Python mapping; its text is the mapping written as YAML.

    Raises:
        RecipeError: The mapping holds values that a YAML recipe cannot hold.
    """
    builder = _Builder(file)
    root = builder.convert(value, 1)
    return Document(root, file, yaml.dump(plain(root), Dumper=_Dumper, sort_keys=False))


def read_one(source: str | Path | Mapping[str, Any], of: str) -> Document:
    """Read a recipe that has one document.

    Args:
        source: Its path, its text (of more than one line), or the recipe as a mapping.
        of: What the recipe is of, for messages: "a mixture".

    Raises:
        RecipeError: It cannot be read, is not YAML, or has another number of documents.
    """
    if isinstance(source, Mapping):
        return parse_mapping(source, "<recipe>")
    if isinstance(source, str) and "\n" in source:
        file, text = "<recipe>", source
    else:
        file, text = shown_path(Path(source)), read_text(Path(source))
    documents = parse_text(text, file)
    if len(documents) != 1:
        raise RecipeError(f"{file}: expected one recipe of {of}, got {len(documents)} documents")
    return documents[0]


def plain(node: Node) -> Any:
    """Return the node's value as plain lists, dictionaries and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


@dataclass(slots=True)
class _Open:
    """A list or mapping that the parser has begun and not yet ended."""

    node: Node
    anchor: str | None
    size: int = 1
    key: tuple[str, int] | None = None
    merged: list[Node] = field(default_factory=list)


class _Builder:
    """Build nodes from parser events on an explicit stack, so that deep nesting cannot exhaust Python's call stack."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.open: list[_Open] = []
        self.anchors: dict[str, tuple[Node, int] | None] = {}
        self.size = 0

    def error(self, line: int, problem: str) -> RecipeError:
        return RecipeError(f"{Place(self.file, line, '')}: {problem}")

    def take(self, event: yaml.Event) -> Node | None:
        """Process the next event; return the root of a document when it is complete."""
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.DocumentStartEvent):
            self.anchors.clear()
            self.size = 0
        elif isinstance(event, yaml.AliasEvent):
            return self._repeat(event.anchor, line)
        elif isinstance(event, yaml.ScalarEvent):
            if self._expects_key():
                self._start_pair(event.value, line)
                return None
            node = Node(self._scalar(event, line), line)
            if event.anchor:
                self.anchors[event.anchor] = (node, 1)
            return self._add(node, 1)
        elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
            self._refuse_as_key(line)
            value: list[Node] | dict[str, Node] = [] if isinstance(event, yaml.SequenceStartEvent) else {}
            self._check_tag(event.tag, value, line)
            self.open.append(_Open(Node(value, line), event.anchor))
            if event.anchor:
                self.anchors[event.anchor] = None
            self._check_size(1, len(self.open), line)
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            done = self.open.pop()
            if isinstance(done.node.value, dict):
                for source in done.merged:
                    self._merge(done.node.value, source)
            if done.anchor:
                self.anchors[done.anchor] = (done.node, done.size)
            return self._add(done.node, done.size, counted=True)
        return None

    def _repeat(self, anchor: str | None, line: int) -> Node | None:
        """Add the value of an anchor."""
        if anchor not in self.anchors:
            raise self.error(
                line, f"alias *{anchor} has no anchor before it; write &{anchor} before the value that it repeats"
            )
        target = self.anchors[anchor]
        if target is None:
            raise self.error(line, f"alias *{anchor} is inside the value that it refers to; move it behind that value")
        self._refuse_as_key(line)
        return self._add(Node(target[0].value, line), target[1])

    def _refuse_as_key(self, line: int) -> None:
        if self._expects_key():
            raise self.error(line, "a key must be a plain text, not a list, mapping or alias")

    def convert(self, value: object, depth: int) -> Node:
        """Return the node of a Python value."""
        self._check_size(1, depth, 0)
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or len(key) > MAX_KEY:
                    raise self.error(0, f"a key must be a short text, got {shown(key)}")
            return Node(
                {self._text(str.__str__(key), 0): self.convert(child, depth + 1) for key, child in value.items()}, 0
            )
        if isinstance(value, list | tuple):
            return Node([self.convert(child, depth + 1) for child in value], 0)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        # numbers and strings of other packages (numpy, enum) become those of Python
        if value is None or isinstance(value, bool):
            return Node(value, 0)
        if isinstance(value, str):
            return Node(self._text(str.__str__(value), 0), 0)
        if isinstance(value, int | float):
            try:
                return Node(finite(int(value) if isinstance(value, int) else float(value)), 0)
            except ValueError as error:
                raise self.error(0, str(error)) from None
        raise self.error(0, f"a recipe holds texts, numbers, flags, lists and mappings, got {type(value).__name__!r}")

    def _expects_key(self) -> bool:
        return bool(self.open) and isinstance(self.open[-1].node.value, dict) and self.open[-1].key is None

    def _start_pair(self, key: str, line: int) -> None:
        self._check_size(1, len(self.open) + 1, line)
        self._text(key, line)
        if len(key) > MAX_KEY:
            raise self.error(line, f"a key of {len(key):,} characters; {MAX_KEY} are allowed")
        pairs = cast(dict[str, Node], self.open[-1].node.value)
        if key in pairs:
            raise self.error(line, f"key {key!r} is written twice, first in line {pairs[key].line}; remove one of them")
        self.open[-1].key = (key, line)

    def _add(self, node: Node, size: int, counted: bool = False) -> Node | None:
        """Add a complete node to the innermost open list or mapping; return the node if none is open."""
        if not counted:
            self._check_size(size, len(self.open) + 1, node.line)
        if not self.open:
            return node
        parent = self.open[-1]
        parent.size += size
        if isinstance(parent.node.value, list):
            parent.node.value.append(node)
        elif parent.key is not None and isinstance(parent.node.value, dict):
            key, line = parent.key
            parent.key = None
            if key == "<<":
                parent.merged.append(node)
            else:
                parent.node.value[key] = Node(node.value, line)
        return None

    def _merge(self, pairs: dict[str, Node], source: Node) -> None:
        """Add the pairs of a `<<:` entry; keys that the mapping itself has take precedence."""
        for mapping in source.value if isinstance(source.value, list) else [source]:
            if not isinstance(mapping.value, dict):
                raise self.error(source.line, f"'<<' takes a mapping or a list of mappings, got {shown(mapping.value)}")
            for key, node in mapping.value.items():
                pairs.setdefault(key, node)

    def _check_size(self, size: int, depth: int, line: int) -> None:
        self.size += size
        if self.size > MAX_NODES:
            raise self.error(line, f"a recipe may hold {MAX_NODES:,} values at most, those of aliases included")
        if depth > MAX_DEPTH:
            raise self.error(line, f"a recipe may be nested {MAX_DEPTH} levels deep at most")

    def _check_tag(self, tag: str | None, value: object, line: int) -> None:
        if tag in (None, "!"):
            return
        name = str(tag).removeprefix(_CORE)
        if name not in _TAGS or not str(tag).startswith(_CORE):
            short = str(tag).replace(_CORE, "!!")
            raise self.error(line, f"the tag {shown(short)} is not allowed; recipes hold plain values only")
        if not isinstance(value, cast(Any, _TAGS[name])):
            raise self.error(line, f"the tag !!{name} does not fit {shown(value)}")

    def _text(self, text: str, line: int) -> str:
        problem = why_no_text(text)
        if problem is not None:
            raise self.error(line, problem)
        return text

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> Scalar:
        text = self._text(event.value, line)
        plain = event.style in (None, "") and event.tag is None
        if event.tag in ("!", f"{_CORE}str") or not (plain or event.tag):
            return text
        try:
            value = read_scalar(text)
        except ValueError as error:
            raise self.error(line, str(error)) from None
        self._check_tag(event.tag, value, line)
        return value
