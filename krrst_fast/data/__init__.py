"""Image sets: many formats in, one packed store out, and views of its images."""

from krrst_fast.data.augment import View, ViewConfig, draw_views, plain_views, render
from krrst_fast.data.prepare import PrepareConfig, prepare
from krrst_fast.data.store import ImageStore, open_store

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
