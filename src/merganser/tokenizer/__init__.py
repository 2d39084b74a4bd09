"""Read from a tokenizer's files which token each row of an embedding stands for, without a tokenizer library."""
