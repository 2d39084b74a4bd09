"""What inputs of other kinds take: tokens that are transplanted, GGUF files, adapters; beside other programs where there are any."""
