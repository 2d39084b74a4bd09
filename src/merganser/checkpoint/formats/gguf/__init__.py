"""GGUF, the format of llama.cpp: its header, its ways of quantising, its names, and what its values must be turned back from."""
