"""Outputs of Merganser in llama.cpp: loaded, run, and compared byte by byte with what its own tools write."""
