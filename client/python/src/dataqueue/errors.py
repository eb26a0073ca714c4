"""What can go wrong, and when it is worth another try."""

from __future__ import annotations

import random
from typing import Any, Optional

import grpc
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "dataqueue"
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
# Answers that come from the way to the server, or from a server that broke off, when they carry no ErrorInfo.
BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)


class Reject(Exception):
    """Raised by a handler: the task becomes a dead letter at once, with this text as its last error."""


class Cancelled(Exception):
    """Raised by `Task.check` when the handler should end."""


class Error(Exception):
    """A call or stream that failed: `code`, the server's `reason` and the refused `field` if it named them."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: Optional[str] = None,
        field: Optional[str] = None,
        retry_after: Optional[float] = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.field = field
        self.retry_after = retry_after

    def __str__(self) -> str:
        head = f"{self.code.name} {self.reason}" if self.reason else self.code.name
        return f"{head} at {self.field}: {self.message}" if self.field else f"{head}: {self.message}"

    @classmethod
    def from_rpc(cls, rpc: Any) -> Error:
        """Reads the status and its details from what grpc or grpc.aio raised."""
        reason = field = retry_after = None
        for key, value in rpc.trailing_metadata() or ():
            if key != "grpc-status-details-bin":
                continue
            try:
                details = status_pb2.Status.FromString(value).details
            except Exception:
                continue  # What cannot be read is as good as absent: the code and the text remain.
            info, bad, retry = (
                error_details_pb2.ErrorInfo(),
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
            )
            for detail in details:
                try:
                    if detail.Unpack(info) and info.domain == DOMAIN:
                        reason = info.reason
                    elif detail.Unpack(bad) and bad.field_violations:
                        field = bad.field_violations[0].field
                    elif detail.Unpack(retry):
                        retry_after = retry.retry_delay.ToTimedelta().total_seconds()
                except Exception:
                    continue
        text = rpc.details() or "no text"
        if field and text.startswith(f"{field}: "):
            text = text[len(field) + 2 :]
        return cls(rpc.code(), text, reason=reason, field=field, retry_after=retry_after)

    @property
    def is_passing(self) -> bool:
        """Whether the server may do the same call later: it is away, its store is, it is overloaded, or it broke off."""
        if self.retry_after is not None:
            return True
        if self.reason is not None:
            return self.code is grpc.StatusCode.UNAVAILABLE
        return self.code in BROKEN or self.code is grpc.StatusCode.DEADLINE_EXCEEDED


class Backoff:
    """Pauses between tries: about 0.1 s, doubling to 2 s, shortened at random by up to half."""

    def __init__(self) -> None:
        self._tries = 0

    def pause(self, error: Optional[Error] = None) -> float:
        """How long to pause now, and not for less than the server asked for."""
        limit = min(FIRST_PAUSE * 2.0 ** min(self._tries, 10), LONGEST_PAUSE)
        self._tries += 1
        asked = error.retry_after if error and error.retry_after else 0.0
        return asked + limit * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._tries = 0
