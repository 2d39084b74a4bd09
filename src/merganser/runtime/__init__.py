"""Merging while a model runs: entries of its key-value cache, tokens of texts and images, tasks chosen by the text."""

from __future__ import annotations

from .cache import MergedCache
from .caches import LAYERS
from .heads import RetrievalHeads, find_retrieval_heads
from .tokens import aim, holitom, merge_frames, merge_tokens, merged_prompt
from .words import embed_groups, merge_words

__all__ = [
    "LAYERS",
    "MergedCache",
    "RetrievalHeads",
    "aim",
    "embed_groups",
    "find_retrieval_heads",
    "holitom",
    "merge_frames",
    "merge_tokens",
    "merge_words",
    "merged_prompt",
]
