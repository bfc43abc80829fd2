"""Self-supervised pre-training of the target network, and the frozen result."""

from krrst_fast.targets.frozen import FrozenTarget, load_target

__all__ = ["FrozenTarget", "load_target"]
