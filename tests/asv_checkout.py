"""A plugin of asv: an environment that puts a commit's checkout on the path and installs nothing.

All else comes from the environment that asv runs in: no network, and no build.
"""

import os
import sys
from typing import Any

from asv import util
from asv.environment import Environment


class Checkout(Environment):
    """asv's own work, checking out one commit after the other, without pip."""

    tool_name = "checkout"

    def __init__(self, conf: Any, python: str, requirements: Any, tagged_env_vars: Any) -> None:
        self._requirements = requirements  # which asv reads before it sets it
        super().__init__(conf, python, requirements, tagged_env_vars)

    def _setup(self) -> None:
        os.makedirs(self._path, exist_ok=True)

    def find_executable(self, executable: str) -> str:
        return sys.executable

    def run(self, args: list[str], **options: Any) -> Any:
        """Run Python with the checkout in front of what is installed."""
        # asv's benchmark script puts this on the path; PYTHONPATH it takes off it.
        env = {**options.pop("env", os.environ), "ASV_PYTHONPATH": self._build_root}
        return util.check_output([sys.executable, *args], env=env, **options)
