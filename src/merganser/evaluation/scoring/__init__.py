"""What a task is, and how a model is scored on one: texts, multiple choice, and tasks of lm-eval."""
