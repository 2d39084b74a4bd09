"""Tokenizers as their files say: which token each row of an embedding stands for. No tokenizer library is needed."""
