"""The baselines that are learnt: their names, settings and learners. Without torch: at once."""

from collections.abc import Mapping
from dataclasses import dataclass

FREE_SETTINGS = ("store", "target", "out", "device", "checkpoint_every", "log_every")
"""Settings that may change in the middle of a run: they say where and how often, not what.

The images and the target themselves may not change: their identities are compared.
"""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A learnt baseline."""

    about: str
    """One line, for --help."""
    config: str
    """Where its config class is, as module:name."""
    learner: str
    """Where the class is that is made from the config and learns, as module:name."""


METHODS: Mapping[str, Method] = {}
