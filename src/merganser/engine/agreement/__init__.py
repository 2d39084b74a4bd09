"""Compare the files beside the weights: configs, tokenizers, chat templates; what the output gets of them."""
