"""The Transformer."""

from llada_lightning.model.transformer import Transformer

__all__ = ["Transformer"]
