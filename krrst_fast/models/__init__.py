"""Networks with a feature map `embed(x)` and a linear head: `forward(x) = fc(embed(x))`."""

from krrst_fast.models.build import ModelConfig, build, check
from krrst_fast.models.network import Network, place

__all__ = ["ModelConfig", "Network", "build", "check", "place"]
