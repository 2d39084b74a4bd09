"""Merging the tokens of a vision encoder: from layer to layer, over the frames of a video, and behind the encoder."""

from __future__ import annotations

from .aim import aim
from .encoder import TokenMerging, merge_tokens
from .holitom import VideoTokens, holitom
from .tempme import FrameMerging, merge_frames

__all__ = ["FrameMerging", "TokenMerging", "VideoTokens", "aim", "holitom", "merge_frames", "merge_tokens"]
