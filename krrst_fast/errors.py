"""The errors a user can act on. Everything else that is raised is a bug."""


class KrrstError(Exception):
    """Base of every error raised on purpose; the command line prints it in one line."""


class NotPositiveDefiniteError(KrrstError, ArithmeticError):
    """The ridged gram has no Cholesky factor, even after the bounded number of larger ridges."""


class NonFiniteError(KrrstError, ValueError):
    """An input holds NaN or infinity."""


class DataError(KrrstError, ValueError):
    """A file, an image or a label is not what the operation needs."""


class ConfigError(KrrstError, ValueError):
    """A setting is unknown, of the wrong type, or out of its range."""


class CheckpointError(KrrstError, RuntimeError):
    """A saved state cannot be read, or belongs to another run."""
