"""The baselines that are learnt: their names, settings and learners. Without torch: at once."""

from collections.abc import Mapping
from dataclasses import dataclass

FREE_SETTINGS = (
    *("store", "target", "out", "expert_folder"),
    *("device", "checkpoint_every", "log_every"),
)
"""Settings that may change in the middle of a run: they say where and how often, not what.

The images, the target and the experts themselves may not change: their identities are compared.
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
    trains_first: bool = False
    """Whether making the learner trains networks, and takes `progress`."""


_HOME = "krrst_fast.baselines"

METHODS: Mapping[str, Method] = {
    "kip": Method(
        about="regress real labels by a fixed kernel of the pixels",
        config=f"{_HOME}.regression_config:KIPConfig",
        learner=f"{_HOME}.kip:KIP",
    ),
    "frepo": Method(
        about="regress real labels by the features of a pool of networks",
        config=f"{_HOME}.regression_config:FRePoConfig",
        learner=f"{_HOME}.frepo:FRePo",
    ),
    "dm": Method(
        about="match the mean features of real images in random networks",
        config=f"{_HOME}.matching_config:DMConfig",
        learner=f"{_HOME}.dm:DM",
    ),
    "dc": Method(
        about="match the gradients that networks have on real images",
        config=f"{_HOME}.matching_config:DCConfig",
        learner=f"{_HOME}.gradient_matching:GradientMatching",
    ),
    "dsa": Method(
        about="match gradients as dc does, with both sides augmented alike",
        config=f"{_HOME}.matching_config:DSAConfig",
        learner=f"{_HOME}.gradient_matching:GradientMatching",
    ),
    "mtt": Method(
        about="match the SGD trajectories of networks trained on the real labels",
        config=f"{_HOME}.trajectory_config:MTTConfig",
        learner=f"{_HOME}.trajectory:MTT",
        trains_first=True,
    ),
    "mkdt": Method(
        about="match the SGD trajectories of networks trained on a target's outputs",
        config=f"{_HOME}.trajectory_config:MKDTConfig",
        learner=f"{_HOME}.trajectory:MKDT",
        trains_first=True,
    ),
}
