"""Models from a hub id, a folder or a GGUF file. torch and transformers are imported by the functions."""

from __future__ import annotations


class ModelLoadError(Exception):
    """A model cannot be loaded or would not be computed rightly; the message says why."""
