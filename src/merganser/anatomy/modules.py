"""The modules of a larger model: its language model, its towers and what joins them; or its encoder and its decoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .infer import Anatomy
from .roles import SIDE

__all__ = ["TEXT", "find_modules", "language_root", "module_name"]

TEXT = "text_decoder"
"""The language model, with its embedding and head. This and other names are those of mergekit."""

SHARED = "shared"
"""What the encoder and the decoder share: the embedding, and the head."""

_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "vis": ("vision_tower", "vision_model", "vision_encoder", "visual"),
    "audio": ("audio_tower", "audio_model", "audio_encoder"),
    "project": ("multi_modal_projector", "projector", "mm_projector"),
}
_TEXT_NAMES = (TEXT, "default", "language_model", "text_model")
# prediction layers belong to the language model
_OWN = ("mtp", "nextn", "draft", "eagle", "medusa")


def find_modules(anatomy: Anatomy) -> dict[str, list[str]]:
    """Return the names of the tensors of each module, in the order of the file.

    Modules other than the language model, the encoder and the decoder are named after the first word in which their
    tensors' names differ from those of the layers: `vision_tower`, `visual`, `multi_modal_projector`.

    Args:
        anatomy: The structure of a checkpoint. Where it shows no module besides the language model, all is `TEXT`.
    """
    halves = _halves(anatomy)
    if anatomy.main is None and not halves:
        return {TEXT: list(anatomy.parts)} if anatomy.parts else {}
    has_towers = bool(halves) or _has_towers(anatomy)
    found: dict[str, list[str]] = {}
    for name in anatomy.parts:
        module = _in_halves(name, halves) if halves else (_beside(name, anatomy) if has_towers else TEXT)
        found.setdefault(module, []).append(name)
    return found


def language_root(anatomy: Anatomy) -> str:
    """Return the prefix of the module in which the main stack is: "model.language_model." or ""."""
    return "" if anatomy.main is None else anatomy.main[: anatomy.main.rfind(".") + 1]


def module_name(written: str, modules: Collection[str], anatomy: Anatomy) -> str | None:
    """Return the name of the module that a recipe means; None if there is none, or if it is not clear which.

    Args:
        written: The name in the recipe. The language model and towers have several names in use.
        modules: The names from `find_modules`.
        anatomy: The structure of the same checkpoint.
    """
    if written in modules:
        return written
    if written in _TEXT_NAMES and TEXT in modules:
        return TEXT
    stacked = {_beside(f"{prefix}.0", anatomy) for prefix in anatomy.stacks}
    for word, names in _OTHER_NAMES.items():
        if written in names:
            fitting = [each for each in modules if word in each and (each in stacked or word == "project")]
            return fitting[0] if len(fitting) == 1 else None
    return None


def _halves(anatomy: Anatomy) -> dict[str, str]:
    """Return "encoder" and "decoder" by the prefix of their tensors, if the model has both."""
    if anatomy.main is not None:
        return {}
    roots: dict[str, str] = {}
    for prefix in anatomy.stacks:
        words = prefix.split(".")
        for half in ("encoder", "decoder"):
            if half in words and not SIDE.search(prefix):
                roots[".".join(words[: words.index(half) + 1]) + "."] = half
    return roots if set(roots.values()) == {"encoder", "decoder"} else {}


def _in_halves(name: str, halves: Mapping[str, str]) -> str:
    half = next((half for root, half in halves.items() if name.startswith(root)), None)
    if half is not None:
        return half
    words = name.removeprefix("model.").split(".")
    return words[0] if SIDE.search(words[0]) else SHARED


def _words_apart(name: str, anatomy: Anatomy) -> tuple[Sequence[str], int, int]:
    """Return the words of a name, the first in which it differs from the main stack's, and the number of those."""
    words, main = name.split("."), (anatomy.main or "").split(".")
    pairs = zip(words, main, strict=False)
    apart = next((i for i, (own, other) in enumerate(pairs) if own != other), min(len(words), len(main)))
    return words, min(apart, len(words) - 1), len(main)


def _is_side(word: str) -> bool:
    return bool(SIDE.search(word.lower())) and not any(own in word.lower() for own in _OWN)


def _has_towers(anatomy: Anatomy) -> bool:
    """Return whether there is a stack of layers beside the language model's."""
    for prefix in anatomy.stacks:
        words, apart, _ = _words_apart(f"{prefix}.0", anatomy)
        if prefix != anatomy.main and _is_side(".".join(words[apart:])):
            return True
    return False


def _beside(name: str, anatomy: Anatomy) -> str:
    """Return the module of a tensor of a model with towers."""
    words, apart, depth = _words_apart(name, anatomy)
    word = words[apart]
    if apart >= depth - 1:
        return word if _is_side(word) else TEXT
    part = anatomy.parts.get(name)
    own = name in (anatomy.embedding, anatomy.head) or any(each in words for each in _OWN)
    if own or (part is not None and part.role == "head" and not _is_side(name)):
        return TEXT
    return word
