"""Scaling studies of masked diffusion (LLaDA) against autoregression, under the same compute."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported when asked for: the command's light verbs start without pandas and torch.
_HOMES = {
    "Sampling": "llada_lightning.generation.sampling",
    "fit": "llada_lightning.training.fit",
    "generate": "llada_lightning.generation.sampler",
    "load_model": "llada_lightning.checkpoints.language_model",
    "log_likelihood": "llada_lightning.evaluation.likelihood",
    "read_results": "llada_lightning.study.results",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
