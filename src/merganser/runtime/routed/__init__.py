"""Several tasks as one model that chooses among them: a merge with sidecars, or a base with adapters."""

from .finding import open_tasks
from .model import RoutedModel
from .tasks import TaskSet

__all__ = ["RoutedModel", "TaskSet", "open_tasks"]
