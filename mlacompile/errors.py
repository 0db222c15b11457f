"""Every error mlacompile raises on purpose: each says what was got, what was expected and what to do."""

from __future__ import annotations


class MLACompileError(Exception):
    """Base of all errors raised by mlacompile."""


class UnsupportedInputError(MLACompileError, ValueError):
    """An op, a kernel or a tool was handed something outside its contract."""


class CheckpointError(MLACompileError, ValueError):
    """A checkpoint lacks something, is damaged or cannot be written; names the file, and the tensor if there is one."""


class OptionsError(MLACompileError, ValueError):
    """An unknown option, or a value that an option does not take."""


class RefusedSiteError(MLACompileError, RuntimeError):
    """``strict=True`` and an attention op could not be rewritten; carries every refused site's reason."""


class VerificationError(MLACompileError, RuntimeError):
    """``verify="first-call"`` found that the compiled graph differs from the original. A bug: please report it."""


class CacheFullError(MLACompileError, IndexError):
    """More tokens than a cache has room for: nothing was written."""


class CacheError(MLACompileError, ValueError):
    """A cache was asked for something it cannot hold, or was handed something that is not a latent."""
