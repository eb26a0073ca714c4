"""How the server is reached: the address, and what both kinds of channels are set to."""

from __future__ import annotations

import os
from importlib import resources
from typing import Any, Optional

ADDRESS = "127.0.0.1:50051"
# A server's largest task, twice, must fit; this is room for whatever its operator allows.
MAX_ANSWER_BYTES = 64 << 20


def address(given: Optional[str]) -> str:
    """What was given, or the environment says, with or without `http://`."""
    target = given or os.environ.get("DATA_QUEUE_ADDR") or ADDRESS
    return target[len("http://") :].rstrip("/") if target.lower().startswith("http://") else target


def options() -> list[tuple[str, Any]]:
    """A dead connection is noticed within 20 s, and one that broke is opened again as soon as the server is back.

    Each channel has a connection of its own: a stream that follows one which was told to drain may find another server.
    """
    config = resources.files("dataqueue").joinpath("service_config.json").read_text("utf-8")
    return [
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
        ("grpc.service_config", config),
    ]
