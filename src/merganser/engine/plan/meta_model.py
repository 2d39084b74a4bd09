"""Models as transformers builds them, without memory: on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["build_model"]


def build_model(config: Mapping[str, Any]) -> Any | str | None:
    """Return the model that a config describes, on the meta device.

    Importing transformers takes one or two seconds, so this is for merges that need it.

    Args:
        config: The contents of config.json.

    Returns:
        The model; a text where transformers refuses the config; None where transformers is missing, does not know the
        class, or the checkpoint brings code of its own.
    """
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures) or config.get("auto_map"):
        return None
    try:
        import torch
        import transformers
    except ImportError:
        return None
    kind: Any = getattr(transformers, str(architectures[0]), None)
    known = getattr(kind, "config_class", None)
    if known is None or known.model_type != config.get("model_type"):
        return None
    logging: Any = transformers.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return kind(known.from_dict(dict(config)))
    except Exception as error:  # a config class may raise anything
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
    finally:
        logging.set_verbosity(verbosity)
