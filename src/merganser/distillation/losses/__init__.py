"""Losses by which one model is taught what others say, as functions of its logits."""
