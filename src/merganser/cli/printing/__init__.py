"""What verbs print: words, numbers and tables, progress, and results as lines."""
