"""The page of a search, or of `auto`: what it found, how it got there, which values matter, and which items tell trials apart."""

from .choice import choice_sections, choice_summary
from .sections import study_sections, study_summary

__all__ = ["choice_sections", "choice_summary", "study_sections", "study_summary"]
