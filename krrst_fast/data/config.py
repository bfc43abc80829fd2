"""Settings of the views of real images."""

from dataclasses import dataclass

from krrst_fast.runs.config import require, settle

INDEX = "index.json"
"""The file that makes a folder a store."""


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """The possible views of an image: (2 padding + 1)^2 crops, twice as many with flips."""

    padding: int = 4
    """Zero pixels round the image that a crop may reach into."""
    flip: bool = True

    def __post_init__(self) -> None:
        settle(self)
        require(self.padding >= 0, self, "padding", "at least 0")
