"""Merging the tokens of a vision encoder, from layer to layer."""

from __future__ import annotations

from .encoder import TokenMerging, merge_tokens

__all__ = ["TokenMerging", "merge_tokens"]
