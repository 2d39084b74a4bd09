"""The page of a search: what it found, how it got there, which values matter, and which items tell trials apart."""

from .sections import study_sections, study_summary

__all__ = ["study_sections", "study_summary"]
