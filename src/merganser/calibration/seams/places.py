"""Where the seams of a stacked model are: found in the recipe of its run record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError, NotFoundError, RecipeError
from ...jsonfile import Entry, read_object
from ...recipe import Recipe, load_recipes
from ...record import RECORD_NAME

__all__ = ["Piece", "Seam", "find_pieces", "find_seams"]


@dataclass(frozen=True)
class Piece:
    """Consecutive layers of a stacked model, from one slice of its recipe.

    Args:
        first: Number of the piece's first layer in the stacked model.
        sources: The models that the slice names, each with the layers that it gives.
    """

    first: int
    sources: tuple[tuple[str, range], ...]

    @property
    def model(self) -> str:
        """The first model that the slice names, with which its layers are compared."""
        return self.sources[0][0]

    @property
    def layers(self) -> range:
        """The layers of that model."""
        return self.sources[0][1]


@dataclass(frozen=True)
class Seam:
    """A place of a stacked model where a layer receives something else than in the model that it came from.

    Args:
        position: Number of the layer after the seam in the stacked model; the number of all layers for the final norm.
        model: The model that what follows came from.
        layer: Number of that layer in `model`; the number of its layers for the final norm.
        before: What is before the seam: "embedding", or model and layer.
        after: What is after it: model and layer, or "final norm".
    """

    position: int
    model: str
    layer: int
    before: str
    after: str


def find_pieces(out: Path) -> list[Piece]:
    """Return the pieces of a stacked model.

    Args:
        out: Folder of the model, or of what `heal` made of it.

    Raises:
        NotFoundError: There is no such folder, or it has no run record.
        CheckpointError: The run record is damaged.
        RecipeError: The recipe stacks no layers.
    """
    if not out.is_dir():
        raise NotFoundError(f"{out}: {'is not a folder' if out.exists() else 'no such folder'}")
    file = out / RECORD_NAME
    if not file.exists():
        raise NotFoundError(
            f"{out}: has no {RECORD_NAME}, which says where the seams are; only what merganser stacked can be examined"
        )
    root = Entry(read_object(file), str(file))
    healed = root.get("healed")
    text = (root if healed is None else healed)["recipe"].text()
    try:
        recipe = load_recipes(text if "\n" in text else f"{text}\n")[-1]
    except RecipeError as error:
        raise CheckpointError(f"{file}: its recipe cannot be read: {error}") from None
    return _pieces(recipe, out)


def _pieces(recipe: Recipe, out: Path) -> list[Piece]:
    if recipe.modules:
        raise RecipeError(f"{out}: was merged by modules; seams are examined in models that are stacked as a whole")
    pieces: list[Piece] = []
    first = 0
    for piece in recipe.slices:
        sources = [(str(own.model), range(*own.layer_range)) for own in piece.sources if own.layer_range is not None]
        if sources:
            pieces.append(Piece(first, tuple(sources)))
            first += len(sources[0][1])
    if not pieces:
        raise RecipeError(f"{out}: was merged from whole models; only stacked layers (slices in the recipe) have seams")
    return pieces


def find_seams(pieces: Sequence[Piece], depth: Callable[[str], int]) -> list[Seam]:
    """Return the seams between pieces, and before the first and after the last one.

    There is no seam where a piece begins with the layer of its model that follows on the one before.

    Args:
        pieces: The pieces.
        depth: Gives the number of layers of a model.
    """
    found = []
    last: dict[str, int] = {}
    before = "embedding"
    for piece in pieces:
        start = piece.layers[0]
        continued = last.get(piece.model, -1 if piece.first == 0 else None) == start - 1
        if not continued:
            found.append(Seam(piece.first, piece.model, start, before, f"{_name(piece.model)} {start}"))
        last = {model: layers[-1] for model, layers in piece.sources}
        before = f"{_name(piece.model)} {piece.layers[-1]}"
    # tensors after the layers are those of the last piece
    piece = pieces[-1]
    count = depth(piece.model)
    if piece.layers[-1] != count - 1:
        found.append(Seam(piece.first + len(piece.layers), piece.model, count, before, "final norm"))
    return found


def _name(model: str) -> str:
    return Path(model).name or model
