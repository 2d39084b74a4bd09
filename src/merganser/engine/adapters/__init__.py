"""Adapters as outputs: extracted from a fine-tune, or merged from other adapters."""
