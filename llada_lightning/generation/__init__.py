"""Floor 2: text from a model: the samplers of the paper's Sec. 2.4 and Appendix B.4."""

from llada_lightning.generation.result import Generation, Snapshot
from llada_lightning.generation.sampling import generate

__all__ = ["Generation", "Snapshot", "generate"]
