"""Which tokens of two tokenizers stand for the same bytes, and what the predictions of one say about the tokens of the other."""
