"""Compare the inputs' configs, tokenizers and chat templates, and decide which of them the output gets."""
