"""Blend answers: several models answer, a ranker orders the answers, and a fuser writes one from the best of them."""
