"""A worker whose handlers run in threads."""

from __future__ import annotations

import queue
import threading
import time
from functools import partial
from typing import Any, Callable, Optional

import grpc

from . import _channel
from ._session import Hold, Hook, Options, Queues, Session
from .errors import Error
from .task import Task
from .v1 import data_queue_pb2 as v1
from .v1 import data_queue_pb2_grpc

Outbox = queue.SimpleQueue[Optional[v1.ConsumeRequest]]


class Worker:
    """Runs a handler for each task of its queues, up to `concurrency` at once, each in a thread.

    A handler that returns has done its task. One that raises has failed: the task comes again after the queue's backoff; after
    `Reject` it does not. When `task.cancelled` is set the handler should end, by an exception unless it has done its work:
    `task.check()` raises one. `deadline` and `grace` are seconds; without `lease` the server's holds. The hooks are called in
    the thread of `run`, when an ack is confirmed or turns out to be too late, and must not block.
    """

    def __init__(
        self,
        queues: Queues,
        handler: Callable[[Task], object],
        *,
        address: Optional[str] = None,
        concurrency: int = 16,
        lease: Optional[float] = None,
        deadline: Optional[float] = None,
        grace: float = 30.0,
        on_acked: Optional[Hook] = None,
        on_lost: Optional[Hook] = None,
    ) -> None:
        self._address = _channel.address(address)
        self._handler = handler
        named = Options.named(queues)
        self._session = Session(Options(named, concurrency, lease, deadline, grace, on_acked, on_lost))
        # What happened, to be told to the session by the thread of `run`, which is the only one that touches it.
        self._inbox: queue.SimpleQueue[Callable[[float], None]] = queue.SimpleQueue()
        self._work: queue.SimpleQueue[Optional[Hold]] = queue.SimpleQueue()
        self._threads = 0
        self._streams: dict[int, tuple[grpc.Channel, Outbox]] = {}

    @property
    def lost(self) -> int:
        """How many acks came too late: their tasks are delivered again."""
        return self._session.lost

    def stop(self) -> None:
        """Lets `run` return when the handlers have ended, or `grace` has passed. From any thread or signal handler."""
        self._inbox.put(self._session.stop)

    def run(self) -> None:
        """Works until `stop`, whatever becomes of the server meanwhile. Once.

        Raises `Error` if the server refuses what it is asked for.
        """
        session = self._session
        try:
            while not session.is_over(time.monotonic()):
                self._take_turn()
            if session.error is not None:
                raise session.error
        finally:
            # On the way out, also after KeyboardInterrupt, handlers are told to end, and nothing is sent any more.
            session.fail(Error(grpc.StatusCode.CANCELLED, "the worker has ended"), time.monotonic())
            for channel, outbox in self._streams.values():
                outbox.put(None)
                channel.close()
            for _ in range(self._threads):
                self._work.put(None)

    def _take_turn(self) -> None:
        """Does what the session wants, waits for something to happen, and tells it that and all that has come meanwhile."""
        session = self._session
        now = time.monotonic()
        session.tick(now)
        self._act(now)
        if session.is_over(now):
            return
        wake_at = session.wake_at()
        try:
            happened = self._inbox.get(timeout=None if wake_at is None else max(wake_at - now, 0.0))
            while True:
                happened(time.monotonic())
                happened = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _act(self, now: float) -> None:
        session = self._session
        session.to_cancel.clear()  # The event in the task has told its handler.
        while session.to_run:
            self._work.put(session.to_run.popleft())
        while self._threads < session.running:
            self._threads += 1
            threading.Thread(target=self._handle, name=f"dataqueue-{self._threads}", daemon=True).start()
        opening = session.open(now)
        if opening is not None:
            stream, first = opening
            outbox: Outbox = queue.SimpleQueue()
            for message in first:
                outbox.put(message)
            channel = grpc.insecure_channel(self._address, options=_channel.options())
            stub = data_queue_pb2_grpc.DataQueueStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Consume(iter(outbox.get, None))
            self._streams[stream] = channel, outbox
            threading.Thread(target=self._read, args=(stream, call), name="dataqueue-stream", daemon=True).start()
        stream, requests = session.requests()
        for request in requests:
            self._streams[stream][1].put(request)

    def _read(self, stream: int, call: Any) -> None:
        error: Optional[Error] = Error(grpc.StatusCode.CANCELLED, "the stream was given up")
        try:
            for response in call:
                self._inbox.put(partial(self._session.receive, stream, response))
            error = None
        except grpc.RpcError as raised:
            error = Error.from_rpc(raised)
        finally:
            # Whatever happened: a stream whose end is not told is never replaced.
            self._inbox.put(partial(self._ended, stream, error))

    def _ended(self, stream: int, error: Optional[Error], now: float) -> None:
        channel, outbox = self._streams.pop(stream)
        outbox.put(None)
        channel.close()
        self._session.ended(stream, error, now)

    def _handle(self) -> None:
        while True:
            hold = self._work.get()
            if hold is None:
                return
            error: Optional[BaseException] = None
            try:
                self._handler(hold.task)
            except BaseException as raised:
                error = raised
            self._inbox.put(partial(self._session.finished, hold, error))
