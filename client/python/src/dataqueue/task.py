"""A task as its handler sees it."""

from __future__ import annotations

import hashlib
import json
import threading
from typing import Any, Mapping, Optional

from .errors import Cancelled
from .v1 import data_queue_pb2 as v1


class Task:
    """A delivered task. `message` is all that the server sent; the rest is there for reading it easily."""

    __slots__ = ("message", "cancelled", "cancelled_because")

    def __init__(self, message: v1.Task) -> None:
        self.message = message
        # Set when the handler should end: its deadline passed, the task was deleted or lost, or the worker stops.
        self.cancelled = threading.Event()
        self.cancelled_because: Optional[str] = None

    @property
    def id(self) -> str:
        return self.message.id

    @property
    def queue(self) -> str:
        return self.message.queue

    @property
    def lease_token(self) -> str:
        return self.message.lease_token

    @property
    def value(self) -> bytes:
        """The payload's bytes, as they were inserted."""
        return self.message.data if self.message.HasField("data") else self.message.json.encode()

    @property
    def headers(self) -> Mapping[str, str]:
        return self.message.headers

    @property
    def deliveries(self) -> int:
        """How often the task was delivered, this time included."""
        return self.message.deliveries

    @property
    def failures(self) -> int:
        """How often holders of the task said that it failed."""
        return self.message.failures

    def json(self) -> Any:
        """The payload, read as JSON."""
        return json.loads(self.value)

    def check(self) -> None:
        """Raises `Cancelled` if the handler should end."""
        if self.cancelled.is_set():
            raise Cancelled(self.cancelled_because or "cancelled")

    def is_whole(self) -> bool:
        """Whether the payload is what was inserted."""
        return hashlib.md5(self.value, usedforsecurity=False).hexdigest() == self.message.md5

    def __repr__(self) -> str:
        return f"Task(id={self.id!r}, queue={self.queue!r}, deliveries={self.deliveries})"
