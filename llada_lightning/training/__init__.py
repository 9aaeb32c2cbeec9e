"""The LightningModules, the fit and its phases, callbacks, and several processes."""

from llada_lightning.training.modules import ArmModule, LladaModule

__all__ = ["ArmModule", "LladaModule"]
