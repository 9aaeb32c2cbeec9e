"""Checkpoints, read and written: our own, Hugging Face LLaDA, Hugging Face Llama."""

from llada_lightning.checkpoints.language_model import LanguageModel, load_model

__all__ = ["LanguageModel", "load_model"]
