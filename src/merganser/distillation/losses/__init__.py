"""Losses that train a model on the predictions of others, as functions of its logits."""
