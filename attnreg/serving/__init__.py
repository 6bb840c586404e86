"""Continuous batching over a paged cache, for tests, research and a single machine."""

from __future__ import annotations

from attnreg.errors import BridgeError

try:
    import transformers  # noqa: F401 - said once, here, and not from somewhere within
except ImportError as error:
    raise BridgeError(
        "transformers",
        f"it cannot be imported ({error})",
        "pip install 'attnreg[transformers]' (transformers 5.17 or newer).",
    ) from error

from attnreg.serving.batcher import ContinuousBatcher
from attnreg.serving.errors import (
    BatcherClosedError,
    RequestCancelledError,
    RequestFailedError,
    RequestPendingError,
    RequestTooLongError,
    ServingError,
    StalledError,
    UnservableModelError,
)
from attnreg.serving.report import Report
from attnreg.serving.request import Request
from attnreg.serving.sampling import Sampling

__all__ = [
    "BatcherClosedError",
    "ContinuousBatcher",
    "Report",
    "Request",
    "RequestCancelledError",
    "RequestFailedError",
    "RequestPendingError",
    "RequestTooLongError",
    "Sampling",
    "ServingError",
    "StalledError",
    "UnservableModelError",
]
