"""What programs that serve models make of our outputs: vLLM and mlx-lm, beside transformers."""
