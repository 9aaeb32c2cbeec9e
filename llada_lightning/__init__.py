"""Scaling studies of masked diffusion (LLaDA) against autoregression, under the same compute."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when asked for: the command's light verbs start without pandas.
    if name == "read_results":
        from llada_lightning.scaling.results import read_results

        return read_results
    if name == "load_model":
        from llada_lightning.checkpoints.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
