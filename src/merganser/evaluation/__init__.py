"""Evaluate models: bits per byte of texts, multiple choice, tasks of lm-eval, and what merges kept of their experts.

result = evaluate(["merged"], ["french.txt"], base="base", experts={"french": "expert"})
result.metric("merged", "french").value
"""

from .result import Evaluation, ModelInfo, TaskInfo
from .retention import Retention
from .run import Progress, evaluate
from .scoring.estimate import Estimate
from .scoring.outcome import Outcome

__all__ = ["Estimate", "Evaluation", "ModelInfo", "Outcome", "Progress", "Retention", "TaskInfo", "evaluate"]
