"""Match the rows of embeddings and heads by their tokens, where a recipe chooses the output's tokenizer."""
