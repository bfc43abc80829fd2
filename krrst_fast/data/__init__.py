"""Image sets: many formats in, one packed store out, and views of its images."""

from typing import TYPE_CHECKING

from krrst_fast.data.config import ViewConfig
from krrst_fast.data.prepare import PrepareConfig, prepare
from krrst_fast.runs.lazy import lazy_names

if TYPE_CHECKING:
    from krrst_fast.data.augment import (
        View,
        draw_views,
        plain_views,
        render,
    )
    from krrst_fast.data.store import (
        ImageStore,
        open_store,
    )

__all__ = [
    "ImageStore",
    "PrepareConfig",
    "View",
    "ViewConfig",
    "draw_views",
    "open_store",
    "plain_views",
    "prepare",
    "render",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "krrst_fast.data.augment": (
            "View",
            "draw_views",
            "plain_views",
            "render",
        ),
        "krrst_fast.data.store": (
            "ImageStore",
            "open_store",
        ),
    },
)
