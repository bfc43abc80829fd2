"""Networks with a feature map `embed(x)` and a linear head: `forward(x) = fc(embed(x))`."""

from typing import TYPE_CHECKING

from krrst_fast.runs.lazy import lazy_names

if TYPE_CHECKING:
    from krrst_fast.models.builder import (
        build,
        check,
    )
    from krrst_fast.models.config import (
        ModelConfig,
    )
    from krrst_fast.models.network import (
        Network,
        place,
    )

__all__ = ["ModelConfig", "Network", "build", "check", "place"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "krrst_fast.models.builder": ("build", "check"),
        "krrst_fast.models.config": ("ModelConfig",),
        "krrst_fast.models.network": (
            "Network",
            "place",
        ),
    },
)
