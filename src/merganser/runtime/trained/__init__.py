"""Layers that merge tokens and must be trained: MrT5's delete gate, GMSA's group merging."""

from __future__ import annotations

from .delete_gate import DeleteGate, Gate, RateController, softmax1
from .group_merging import GroupMerging, SemanticAlignment

__all__ = ["DeleteGate", "Gate", "GroupMerging", "RateController", "SemanticAlignment", "softmax1"]
