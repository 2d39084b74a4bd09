"""The version of merganser."""

__version__ = "0.1.0"
