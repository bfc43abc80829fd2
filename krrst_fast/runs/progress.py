"""The progress bar of everything that takes long."""

from typing import Any


class _NoBar:
    """A progress bar that shows nothing, for environments without tqdm."""

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass

    def set_description(self, desc: str) -> None:
        pass

    def set_postfix(self, shown: Any, refresh: bool = True) -> None:
        pass


def progress_bar(show: bool, **options: Any) -> Any:
    """Return a tqdm bar, a context manager; it is drawn only on a terminal.

    Args:
        show: False draws nothing anywhere.
        options: Options of tqdm: `total`, `initial`, `desc`, `unit`.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _NoBar()
    # None: no bar where standard error is not a terminal.
    return tqdm(disable=None if show else True, dynamic_ncols=True, **options)
