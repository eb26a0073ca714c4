"""A producer, and a batcher that gathers single tasks into inserts."""

from __future__ import annotations

import json
import threading
import time
import uuid
from concurrent.futures import Future
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Mapping, NamedTuple, Optional

import grpc

from . import _channel
from .errors import Backoff, Error
from .v1 import data_queue_pb2 as v1
from .v1 import data_queue_pb2_grpc

MAX_BATCH = 1_000
MAX_BATCH_BYTES = 1 << 20
# Request ids are remembered for 5 minutes: a repeat must not come later.
MAX_TIMEOUT = 300.0
# A try that takes longer is given up for another one.
TRY = 10.0


class Inserted(NamedTuple):
    """What became of a task. Of a duplicate, `id` is that of the task that has its unique key."""

    id: str
    duplicate: bool


def new_task(
    value: Any,
    *,
    headers: Optional[Mapping[str, str]] = None,
    priority: int = 0,
    delay: Optional[timedelta] = None,
    deliver_at: Optional[datetime] = None,
    ttl: Optional[timedelta] = None,
    unique_key: str = "",
) -> v1.NewTask:
    """A task to insert: bytes as they are, anything else as JSON. `v1.NewTask(json=...)` takes a JSON text as it is."""
    task = v1.NewTask(headers=headers, priority=priority, unique_key=unique_key)
    if isinstance(value, (bytes, bytearray, memoryview)):
        task.data = bytes(value)
    else:
        task.json = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    if delay is not None:
        task.delay.FromTimedelta(delay)
    if deliver_at is not None:
        task.deliver_at.FromDatetime(deliver_at)
    if ttl is not None:
        task.ttl.FromTimedelta(ttl)
    return task


class Insert:
    """One insert over all its tries: what is sent each time, for how long, and whether there is another one."""

    def __init__(
        self, queue: str, tasks: tuple[v1.NewTask, ...], request_id: Optional[str], timeout: float, now: float
    ) -> None:
        if not 0 < timeout < MAX_TIMEOUT:
            raise ValueError(f"the timeout is {timeout:g} s: give more than 0 s and less than {MAX_TIMEOUT:g} s")
        self.request = v1.InsertRequest(queue=queue, tasks=tasks, request_id=request_id or str(uuid.uuid4()))
        self._deadline = now + timeout
        self._backoff = Backoff()

    def timeout(self, now: float) -> float:
        return max(min(self._deadline - now, TRY), 0.001)

    def pause_after(self, error: Error, now: float) -> float:
        """How long to wait before the next try; raises the error if it is a refusal, or no time is left."""
        pause = self._backoff.pause(error)
        if not error.is_passing or now + pause >= self._deadline:
            raise error
        return pause

    @staticmethod
    def results(response: v1.InsertResponse) -> list[Inserted]:
        return [Inserted(result.id, result.duplicate) for result in response.results]


class Producer:
    """Inserts tasks, each exactly once: a call whose answer was lost is repeated with the same request id.

    For use from any number of threads. `timeout` is for all tries of an insert together, in seconds.
    """

    def __init__(self, address: Optional[str] = None, *, timeout: float = 30.0) -> None:
        self._timeout = timeout
        self._channel = grpc.insecure_channel(_channel.address(address), options=_channel.options())
        self._stub: Any = data_queue_pb2_grpc.DataQueueStub(self._channel)  # type: ignore[no-untyped-call]

    def insert(
        self, queue: str, *tasks: v1.NewTask, request_id: Optional[str] = None, timeout: Optional[float] = None
    ) -> list[Inserted]:
        """Inserts all of the tasks or none, and answers one result for each.

        Raises `Error` for a refusal at once, and for a server that is away or full when the time is over. Then the tasks may
        have been inserted: only a repeat with the same `request_id` tells.
        """
        wanted = self._timeout if timeout is None else timeout
        insert = Insert(queue, tasks, request_id, wanted, time.monotonic())
        while True:
            try:
                response = self._stub.Insert(insert.request, timeout=insert.timeout(time.monotonic()))
                return Insert.results(response)
            except grpc.RpcError as raised:
                time.sleep(insert.pause_after(Error.from_rpc(raised), time.monotonic()))

    def batcher(self, queue: str, *, linger: float = 0.005, in_flight: int = 4) -> Batcher:
        return Batcher(self, queue, linger=linger, in_flight=in_flight)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Producer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Batcher:
    """Gathers tasks into inserts of up to 1,000 tasks or 1 MiB, or of what came within `linger` seconds.

    Up to `in_flight` inserts are under way at once, and those may overtake each other: with 1 the order is kept. Tasks of one insert
    share its fate: one that is refused fails the others with it.
    """

    def __init__(self, producer: Producer, queue: str, *, linger: float, in_flight: int) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight is {in_flight}: give 1 or more")
        self._producer = producer
        self._queue = queue
        self._linger = linger
        self._changed = threading.Condition()
        self._tasks: list[tuple[v1.NewTask, Future[Inserted]]] = []
        self._bytes = 0
        self._due = 0.0
        self._under_way = 0
        self._flushing = 0
        self._is_closed = False
        self._threads = [threading.Thread(target=self._send, daemon=True) for _ in range(in_flight)]
        for thread in self._threads:
            thread.start()

    def add(self, task: v1.NewTask) -> Future[Inserted]:
        """Adds a task, and waits only if a whole insert's worth of them waits already."""
        size = task.ByteSize()
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._has_room(size))
            if self._is_closed:
                raise RuntimeError("the batcher is closed")
            future: Future[Inserted] = Future()
            # Whoever waits for it may not take it back: it is on its way.
            future.set_running_or_notify_cancel()
            if not self._tasks:
                self._due = time.monotonic() + self._linger
                self._changed.notify_all()
            self._tasks.append((task, future))
            self._bytes += size
            if self._is_full():
                self._changed.notify_all()
            return future

    def flush(self) -> None:
        """Waits until all that was added is answered; the futures tell how."""
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._tasks and not self._under_way)
            self._flushing -= 1

    def close(self) -> None:
        """Sends what was added, and waits for the answers."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _has_room(self, size: int) -> bool:
        return not self._tasks or (not self._is_full() and self._bytes + size <= MAX_BATCH_BYTES)

    def _is_full(self) -> bool:
        return len(self._tasks) >= MAX_BATCH or self._bytes >= MAX_BATCH_BYTES

    def _send(self) -> None:
        while True:
            with self._changed:
                while not self._tasks or not self._is_due():
                    if self._is_closed and not self._tasks:
                        return
                    self._changed.wait(max(self._due - time.monotonic(), 0.0) if self._tasks else None)
                batch, self._tasks, self._bytes = self._tasks, [], 0
                self._under_way += 1
                self._changed.notify_all()
            try:
                results = self._producer.insert(self._queue, *(task for task, _ in batch))
                for (_, future), result in zip(batch, results):
                    future.set_result(result)
            except BaseException as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def _is_due(self) -> bool:
        return self._is_closed or self._flushing > 0 or self._is_full() or time.monotonic() >= self._due

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()
