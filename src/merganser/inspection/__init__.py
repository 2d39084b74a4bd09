"""Look at checkpoints without merging them: contents, differences, task vectors, spectra."""

from .contents import inspect
from .difference import diff
from .task_vectors import kinship

__all__ = ["diff", "inspect", "kinship"]
