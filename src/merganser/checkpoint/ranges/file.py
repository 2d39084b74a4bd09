"""A file of the Hub at one commit, as it was when its header was read."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RemoteFile"]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of the Hub that is read by ranges.

    Args:
        model: Id of the model.
        commit: The commit.
        name: Path of the file in the model's repository.
        size: Its size in bytes.
        etag: What the Hub calls its contents: the sha256 of large files.
    """

    model: str
    commit: str
    name: str
    size: int
    etag: str

    @property
    def address(self) -> str:
        """The file as huggingface_hub's HfFileSystem names it."""
        return f"hf://{self.model}@{self.commit}/{self.name}"

    def __str__(self) -> str:
        return f"model {self.model!r}: {self.name}"
