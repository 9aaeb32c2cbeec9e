"""Floor 3: the LightningModules, the schedule, and one callback a file."""

from llada_lightning.training.modules import ArmModule, LladaModule

__all__ = ["ArmModule", "LladaModule"]
