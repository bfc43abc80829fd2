"""The settings that all learnt baselines share. Without torch: the command line reads them."""

from dataclasses import dataclass
from pathlib import Path

from krrst_fast.runs.config import require_at_least, settle


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Where a learnt baseline reads and writes, how long it learns, how often it logs and saves."""

    store: Path
    """A folder made by `krrst prepare`, with labels unless the method looks at none; its train
    split is distilled."""
    out: Path
    """The run folder."""
    steps: int
    """Outer steps."""
    seed: int = 0
    device: str = "auto"
    checkpoint_every: int = 500
    """Outer steps between checkpoints."""
    log_every: int = 20

    def __post_init__(self) -> None:
        settle(self)
        require_at_least(1, self, "steps", "checkpoint_every", "log_every")
