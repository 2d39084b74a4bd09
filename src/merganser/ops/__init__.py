"""Maths that two or more merge methods share."""
