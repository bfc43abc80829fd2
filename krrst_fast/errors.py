"""The errors that a user can act on."""


class KrrstError(Exception):
    """Base of the errors below; the command line prints them in one line."""


class NotPositiveDefiniteError(KrrstError, ArithmeticError):
    """The Cholesky factorisation failed with every ridge that was tried."""


class NonFiniteError(KrrstError, ValueError):
    """An input holds NaN or infinity."""


class DataError(KrrstError, ValueError):
    """A file, an image or a label is not what the operation needs."""


class ConfigError(KrrstError, ValueError):
    """A setting is unknown, of the wrong type, or out of its range."""


class CheckpointError(KrrstError, RuntimeError):
    """A saved state cannot be read, or belongs to another run."""
