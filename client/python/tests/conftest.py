"""Real servers, each on a port and with a folder of its own, and workers of both kinds behind one face."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Awaitable, Callable, Iterator, Optional

import grpc
import pytest

import dataqueue
from dataqueue import aio
from dataqueue.v1 import data_queue_pb2_grpc
from dataqueue.v1 import queue_admin_pb2 as admin
from dataqueue.v1 import queue_admin_pb2_grpc

PATIENCE = 20.0
BINARY = Path(os.environ.get("DATA_QUEUE_SERVER") or Path(__file__).parents[3] / "target/debug/data-queue-server")
Until = Callable[[threading.Event], Awaitable[None]]


def eventually(what: str, look: Callable[[], Any]) -> Any:
    """What `look` answers once it is true; not the time it takes."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"it never came to be: {what}"
        time.sleep(0.005)


class Server:
    def __init__(self, folder: Path) -> None:
        assert BINARY.exists(), f"{BINARY} is missing: cargo build --locked -p data-queue-server builds it"
        self.folder = folder
        self.address = "127.0.0.1:0"
        self.process: Optional[subprocess.Popen[str]] = None

    def start(self) -> Server:
        command = [str(BINARY), "--listen", self.address, "--data-dir", str(self.folder), "--backoff-min", "0s"]
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        told = next((line for line in self.process.stdout if line.startswith("listening on ")), None)
        assert told, (self.folder / "log").read_text()
        self.address = told.split()[-1]
        channel = self.channel = grpc.insecure_channel(self.address)
        self.queues = data_queue_pb2_grpc.DataQueueStub(channel)
        self.admin = queue_admin_pb2_grpc.QueueAdminStub(channel)
        return self

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def insert(self, queue: str, *values: Any) -> list[str]:
        with dataqueue.Producer(self.address) as producer:
            return [result.id for result in producer.insert(queue, *map(dataqueue.new_task, values))]

    def counts(self, queue: str) -> Any:
        return self.admin.GetQueue(admin.GetQueueRequest(queue=queue)).queue.counts

    def task(self, queue: str, id: str) -> Any:
        return self.admin.GetTask(admin.GetTaskRequest(queue=queue, id=id)).task


class Running:
    """A worker of either kind that runs beside the test.

    Handlers are written once, as coroutines of a task and of `until`, which waits for an event or for the cancellation: for a thread
    it blocks, and the coroutine never pauses.
    """

    def __init__(
        self, flavour: str, address: str, queue: Any, handler: Callable[[dataqueue.Task, Until], Awaitable[None]], **options: Any
    ) -> None:
        self.acked: list[str] = []
        options = {"concurrency": 8, "on_acked": lambda task: self.acked.append(task.id), **options}
        self.error: Optional[BaseException] = None
        self.handler = handler
        self.loop: Optional[asyncio.AbstractEventLoop] = None
        if flavour == "asyncio":
            self.worker: Any = aio.Worker(queue, self._handle_async, address=address, **options)
        else:
            self.worker = dataqueue.Worker(queue, self._handle, address=address, **options)
        self.thread = threading.Thread(target=self._run, args=(flavour,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        if self.loop is None:
            self.worker.stop()
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.worker.stop)

    def join(self) -> None:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "run did not return"

    def end(self) -> None:
        self.stop()
        self.join()
        assert self.error is None, self.error

    def _run(self, flavour: str) -> None:
        try:
            asyncio.run(self._run_async()) if flavour == "asyncio" else self.worker.run()
        except BaseException as error:
            self.error = error

    async def _run_async(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self.worker.run()

    async def _handle_async(self, task: dataqueue.Task) -> None:
        async def until(event: threading.Event) -> None:
            while not event.is_set():
                await asyncio.sleep(0.005)

        await self.handler(task, until)

    def _handle(self, task: dataqueue.Task) -> None:
        async def until(event: threading.Event) -> None:
            while not event.wait(0.005):
                task.check()

        try:
            self.handler(task, until).__await__().send(None)  # type: ignore[attr-defined]
        except StopIteration:
            pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture(params=["threads", "asyncio"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[..., Running]]:
    """Starts workers of one kind, and stops them at the end."""
    workers: list[Running] = []

    def start(*arguments: Any, **options: Any) -> Running:
        workers.append(Running(request.param, *arguments, **options))
        return workers[-1]

    yield start
    for worker in workers:
        worker.stop()
        worker.join()
