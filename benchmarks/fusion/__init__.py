"""Fusion of three experts of the real zoo into the base, beside plain fine-tuning on the same batches."""
