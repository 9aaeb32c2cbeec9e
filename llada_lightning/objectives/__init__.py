"""Floor 1: the forward process, the losses and the bounds, as functions on tensors."""
