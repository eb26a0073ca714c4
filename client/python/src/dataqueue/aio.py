"""The worker and the producer for asyncio. The same rules, and an event loop in place of threads."""

from __future__ import annotations

import asyncio
from typing import Any, Awaitable, Callable, Coroutine, Optional

import grpc
import grpc.aio

from . import _channel
from ._session import Hold, Hook, Options, Queues, Session
from .errors import Error
from .producer import MAX_BATCH, MAX_BATCH_BYTES, Insert, Inserted
from .task import Task
from .v1 import data_queue_pb2 as v1
from .v1 import data_queue_pb2_grpc

Outbox = asyncio.Queue[Optional[v1.ConsumeRequest]]


class Worker:
    """Runs a coroutine for each task of its queues, up to `concurrency` at once. As `dataqueue.Worker`, but a handler that should
    end is cancelled. One that swallows the cancellation and returns has done its task, unless its deadline had passed."""

    def __init__(
        self,
        queues: Queues,
        handler: Callable[[Task], Coroutine[Any, Any, object]],
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
        self._handlers: dict[Hold, asyncio.Task[object]] = {}
        self._streams: dict[int, tuple[asyncio.Task[None], Outbox]] = {}
        self._is_stopped = False
        self._wake: Optional[asyncio.Event] = None
        self._loop: Optional[asyncio.AbstractEventLoop] = None

    @property
    def lost(self) -> int:
        """How many acks came too late: their tasks are delivered again."""
        return self._session.lost

    def stop(self) -> None:
        """Lets `run` return when the handlers have ended, or `grace` has passed. From any thread or signal handler."""
        self._is_stopped = True
        if self._loop is not None and not self._loop.is_closed():
            # A loop that has nothing to do sleeps in its selector, also through signals: only this wakes it.
            self._loop.call_soon_threadsafe(self._woken)

    async def run(self) -> None:
        """Works until `stop`, whatever becomes of the server meanwhile. Once.

        Raises `Error` if the server refuses what it is asked for.
        """
        loop = self._loop = asyncio.get_running_loop()
        session = self._session
        wake = self._wake = asyncio.Event()
        try:
            while True:
                wake.clear()
                now = loop.time()
                if self._is_stopped:
                    session.stop(now)
                session.tick(now)
                self._act(now)
                if session.is_over(now):
                    break
                wake_at = session.wake_at()
                timer = None if wake_at is None else loop.call_at(wake_at, wake.set)
                await wake.wait()
                if timer is not None:
                    timer.cancel()
            if session.error is not None:
                raise session.error
        finally:
            # On the way out, also when this was cancelled, nothing is left running.
            for handler in self._handlers.values():
                handler.cancel()
            streams = [stream for stream, _ in self._streams.values()]
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    def _woken(self) -> None:
        if self._wake is not None:
            self._wake.set()

    def _act(self, now: float) -> None:
        session = self._session
        while session.to_cancel:
            handler = self._handlers.get(session.to_cancel.popleft())
            if handler is not None:
                handler.cancel()
        while session.to_run:
            self._start(session.to_run.popleft())
        opening = session.open(now)
        if opening is not None:
            stream, first = opening
            outbox: Outbox = asyncio.Queue()
            for message in first:
                outbox.put_nowait(message)
            self._streams[stream] = asyncio.ensure_future(self._follow(stream, outbox)), outbox
        stream, requests = session.requests()
        for request in requests:
            self._streams[stream][1].put_nowait(request)

    def _start(self, hold: Hold) -> None:
        handler = asyncio.ensure_future(self._handle(hold.task))
        self._handlers[hold] = handler

        def ended(handler: asyncio.Future[object]) -> None:
            del self._handlers[hold]
            error = asyncio.CancelledError() if handler.cancelled() else handler.exception()
            self._session.finished(hold, error, handler.get_loop().time())
            self._woken()

        handler.add_done_callback(ended)

    async def _handle(self, task: Task) -> object:
        return await self._handler(task)

    async def _follow(self, stream: int, outbox: Outbox) -> None:
        """Opens a stream and tells the session what becomes of it."""
        session, loop = self._session, asyncio.get_running_loop()
        error: Optional[Error] = Error(grpc.StatusCode.CANCELLED, "the stream was given up")
        try:
            async with grpc.aio.insecure_channel(self._address, options=_channel.options()) as channel:
                stub: Any = data_queue_pb2_grpc.DataQueueStub(channel)  # type: ignore[no-untyped-call]
                call = stub.Consume()
                writer = asyncio.ensure_future(self._write(call, outbox))
                try:
                    async for response in call:
                        session.receive(stream, response, loop.time())
                        self._woken()
                finally:
                    writer.cancel()
            error = None
        except grpc.aio.AioRpcError as raised:
            error = Error.from_rpc(raised)
        finally:
            del self._streams[stream]
            session.ended(stream, error, loop.time())
            self._woken()

    @staticmethod
    async def _write(call: Any, outbox: Outbox) -> None:
        try:
            while True:
                request = await outbox.get()
                if request is None:
                    await call.done_writing()
                    return
                await call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # The stream has ended: its reader tells why.


class Producer:
    """Inserts tasks, each exactly once: a call whose answer was lost is repeated with the same request id.

    `timeout` is for all tries of an insert together, in seconds. To be made where a loop runs.
    """

    def __init__(self, address: Optional[str] = None, *, timeout: float = 30.0) -> None:
        self._timeout = timeout
        self._channel = grpc.aio.insecure_channel(_channel.address(address), options=_channel.options())
        self._stub: Any = data_queue_pb2_grpc.DataQueueStub(self._channel)  # type: ignore[no-untyped-call]

    async def insert(
        self, queue: str, *tasks: v1.NewTask, request_id: Optional[str] = None, timeout: Optional[float] = None
    ) -> list[Inserted]:
        """Inserts all of the tasks or none, and answers one result for each. Errors as of `dataqueue.Producer.insert`."""
        time = asyncio.get_running_loop().time
        insert = Insert(queue, tasks, request_id, self._timeout if timeout is None else timeout, time())
        while True:
            try:
                return Insert.results(await self._stub.Insert(insert.request, timeout=insert.timeout(time())))
            except grpc.aio.AioRpcError as raised:
                await asyncio.sleep(insert.pause_after(Error.from_rpc(raised), time()))

    def batcher(self, queue: str, *, linger: float = 0.005, in_flight: int = 4) -> Batcher:
        return Batcher(self, queue, linger=linger, in_flight=in_flight)

    async def close(self) -> None:
        await self._channel.close(None)

    async def __aenter__(self) -> Producer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Batcher:
    """Gathers tasks into inserts, as `dataqueue.Batcher` does."""

    def __init__(self, producer: Producer, queue: str, *, linger: float, in_flight: int) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight is {in_flight}: give 1 or more")
        self._producer = producer
        self._queue = queue
        self._linger = linger
        self._in_flight = in_flight
        self._room = asyncio.Semaphore(in_flight)
        self._tasks: list[tuple[v1.NewTask, asyncio.Future[Inserted]]] = []
        self._bytes = 0
        self._timer: Optional[asyncio.TimerHandle] = None
        self._sending: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def add(self, task: v1.NewTask) -> Awaitable[Inserted]:
        """Adds a task, and waits only if as many inserts as may be are under way. What it answers can be awaited for the result."""
        size = task.ByteSize()
        while len(self._sending) > self._in_flight:
            await asyncio.wait(self._sending, return_when=asyncio.FIRST_COMPLETED)
        if self._is_closed:
            raise RuntimeError("the batcher is closed")
        loop = asyncio.get_running_loop()
        if self._tasks and self._bytes + size > MAX_BATCH_BYTES:
            self._send()
        future: asyncio.Future[Inserted] = loop.create_future()
        self._tasks.append((task, future))
        self._bytes += size
        if len(self._tasks) >= MAX_BATCH or self._bytes >= MAX_BATCH_BYTES:
            self._send()
        elif self._timer is None:
            self._timer = loop.call_later(self._linger, self._send)
        return future

    async def flush(self) -> None:
        """Waits until all that was added is answered; what `add` gave tells how."""
        while self._tasks or self._sending:
            self._send()
            await asyncio.wait(self._sending)

    async def close(self) -> None:
        """Sends what was added, and waits for the answers."""
        self._is_closed = True
        await self.flush()

    async def __aenter__(self) -> Batcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._tasks:
            batch, self._tasks, self._bytes = self._tasks, [], 0
            sending = asyncio.ensure_future(self._insert(batch))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    async def _insert(self, batch: list[tuple[v1.NewTask, asyncio.Future[Inserted]]]) -> None:
        async with self._room:
            try:
                results = await self._producer.insert(self._queue, *(task for task, _ in batch))
                for (_, future), result in zip(batch, results):
                    if not future.done():
                        future.set_result(result)
            except BaseException as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                if not isinstance(error, Exception):
                    raise
