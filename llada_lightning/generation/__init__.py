"""Text from a model: the samplers of the paper's Sec. 2.4 and Appendix B.4."""

from typing import TYPE_CHECKING, Any

from llada_lightning.generation.sampling import Generation, Sampling, Snapshot

if TYPE_CHECKING:
    from llada_lightning.generation.sampler import generate

__all__ = ["Generation", "Sampling", "Snapshot", "generate"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `llada generate --help` does not wait for torch.
    if name == "generate":
        from llada_lightning.generation.sampler import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
