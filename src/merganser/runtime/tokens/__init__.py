"""Merging the tokens of a vision encoder: from layer to layer, over the frames of a video, and behind the encoder."""

from __future__ import annotations

from .aim import ImageTokens, aim
from .encoder import TokenMerging
from .holitom import VideoTokens, holitom
from .merge import merge_tokens
from .prompt import merged_prompt
from .qwen import CellMerging
from .tempme import FrameMerging, merge_frames

__all__ = [
    "CellMerging",
    "FrameMerging",
    "ImageTokens",
    "TokenMerging",
    "VideoTokens",
    "aim",
    "holitom",
    "merge_frames",
    "merge_tokens",
    "merged_prompt",
]
