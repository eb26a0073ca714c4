"""What every client can show: `scenario` runs the steps that all languages share, `work` is a worker until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import logging
import signal
import sys
import threading
import time
from typing import Any, Callable, Optional

import grpc

import dataqueue
from dataqueue import aio
from dataqueue.v1 import data_queue_pb2 as v1
from dataqueue.v1 import data_queue_pb2_grpc as v1_grpc
from dataqueue.v1 import queue_admin_pb2 as admin
from dataqueue.v1 import queue_admin_pb2_grpc as admin_grpc

PATIENCE = 120.0


class Failed(Exception):
    """A step went otherwise than expected."""


def say(*words: object) -> None:
    print(*words, flush=True)


def same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise Failed(f"{what}: found {found!r}, expected {expected!r}")


class Flavour:
    """A worker in this process, with a handler that takes (task) and may raise, and `hold` seconds of work: the same for both."""

    def __init__(self, name: str, queue: str, handler: Callable[[dataqueue.Task], None], hold: float, **options: Any) -> None:
        self.is_asyncio = name == "asyncio"
        self.handler, self.hold = handler, hold
        if self.is_asyncio:
            self.worker: Any = aio.Worker(queue, self.handle_async, **options)
        else:
            self.worker = dataqueue.Worker(queue, self.handle, **options)
        self.loop: Optional[asyncio.AbstractEventLoop] = None

    def handle(self, task: dataqueue.Task) -> None:
        self.handler(task)
        if task.cancelled.wait(self.hold):
            task.check()
        self.after(task)

    async def handle_async(self, task: dataqueue.Task) -> None:
        self.handler(task)
        await asyncio.sleep(self.hold)
        self.after(task)

    def after(self, task: dataqueue.Task) -> None:
        """The work is done; it may have failed."""

    def run(self) -> None:
        if self.is_asyncio:
            asyncio.run(self.run_async())
        else:
            self.worker.run()

    async def run_async(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self.worker.run()

    def stop(self) -> None:
        """From any thread."""
        if self.loop is None:
            self.worker.stop()
        else:
            self.loop.call_soon_threadsafe(self.worker.stop)


class Scenario:
    def __init__(self, address: str, prefix: str, flavour: str) -> None:
        self.address, self.prefix, self.flavour = address, prefix, flavour
        channel = grpc.insecure_channel(address)
        self.queues = v1_grpc.DataQueueStub(channel)
        self.admin = admin_grpc.QueueAdminStub(channel)
        self.tasks: dict[str, v1.NewTask] = {}
        self.ids: dict[str, str] = {}
        self.tokens: dict[str, list[str]] = {}

    def run(self, steps: list[dict[str, Any]]) -> bool:
        for number, step in enumerate(steps, 1):
            queue = f"{self.prefix}-{step['queue']}"
            try:
                getattr(self, step["do"])(step, queue)
            except (Failed, grpc.RpcError, dataqueue.Error) as error:
                say("failed", number, step["do"], f"{step['queue']}:", error)
                return False
            say("ok", number, step["do"], step["queue"])
        return True

    def insert(self, step: dict[str, Any], queue: str) -> None:
        expect = step["expect"]
        tasks = [
            v1.NewTask(json=task["json"], headers=task.get("headers"))
            if "json" in task
            else v1.NewTask(data=base64.b64decode(task["data"]), headers=task.get("headers"))
            for task in step["tasks"]
        ]
        request_id = f"{self.prefix}-{step['request_id']}" if "request_id" in step else ""
        try:
            response = self.queues.Insert(v1.InsertRequest(queue=queue, tasks=tasks, request_id=request_id))
        except grpc.RpcError as raised:
            if "error" not in expect:
                raise
            error = dataqueue.Error.from_rpc(raised)
            found = {"code": error.code.name, "reason": error.reason, "field": error.field}
            for key, value in expect["error"].items():
                same(key, found[key], value)
            return
        if "error" in expect:
            raise Failed("it was not refused")
        same("replayed", response.replayed, expect["replayed"])
        for name, task, result in zip(step["names"], tasks, response.results):
            same(f"id of {name}", result.id, self.ids.get(name, result.id))
            self.ids[name], self.tasks[name] = result.id, task

    def pop(self, step: dict[str, Any], queue: str) -> None:
        request = v1.PopRequest(queue=queue)
        self.set_times(request, step, "lease", "wait")
        response = self.queues.Pop(request)
        self.popped(step, [response.task] if response.HasField("task") else [])

    def pop_batch(self, step: dict[str, Any], queue: str) -> None:
        request = v1.PopBatchRequest(queue=queue, max_tasks=step["max_tasks"])
        self.set_times(request, step, "lease", "wait")
        self.popped(step, [task for response in self.queues.PopBatch(request) for task in response.tasks])

    def popped(self, step: dict[str, Any], tasks: list[v1.Task]) -> None:
        expect = step["expect"]
        same("ids", [task.id for task in tasks], [self.ids[name] for name in expect["tasks"]])
        if "deliveries" in expect:
            same("deliveries", [task.deliveries for task in tasks], expect["deliveries"])
        for name, task in zip(expect["tasks"], tasks):
            given = self.tasks[name]
            kind = given.WhichOneof("value")
            same(f"kind of {name}", task.WhichOneof("value"), kind)
            same(f"value of {name}", getattr(task, kind), getattr(given, kind))
            same(f"headers of {name}", dict(task.headers), dict(given.headers))
            same(f"md5 of {name}", dataqueue.Task(task).is_whole(), True)
            self.tokens.setdefault(name, []).append(task.lease_token)

    def ack(self, step: dict[str, Any], queue: str) -> None:
        response = self.queues.Ack(v1.AckRequest(queue=queue, lease_tokens=self.tokens_of(step)))
        self.outcomes(step, response)

    def heartbeat(self, step: dict[str, Any], queue: str) -> None:
        request = v1.HeartbeatRequest(queue=queue, lease_tokens=self.tokens_of(step))
        self.set_times(request, step, "lease")
        self.outcomes(step, self.queues.Heartbeat(request))

    def putback(self, step: dict[str, Any], queue: str) -> None:
        flags = {key: step[key] for key in ("reason", "failed", "dead_letter") if key in step}
        tokens = v1.PutbackTokens(lease_tokens=self.tokens_of(step), **flags)
        self.set_times(tokens, step, "delay")
        self.outcomes(step, self.queues.Putback(v1.PutbackRequest(queue=queue, tokens=tokens)))

    def outcomes(self, step: dict[str, Any], response: Any) -> None:
        found = [v1.Outcome.Name(outcome)[len("OUTCOME_") :] for outcome in response.outcomes]
        same("outcomes", found, step["expect"]["outcomes"])

    def tokens_of(self, step: dict[str, Any]) -> list[str]:
        last = [self.tokens[name][-1] for name in step.get("tasks", [])]
        return last + [self.tokens[name][-2] for name in step.get("stale", [])]

    @staticmethod
    def set_times(message: Any, step: dict[str, Any], *names: str) -> None:
        for name in names:
            if name in step:
                getattr(message, name).FromMilliseconds(step[name])

    def counts(self, step: dict[str, Any], queue: str) -> None:
        deadline = time.monotonic() + 10
        while True:
            counts = self.admin.GetQueue(admin.GetQueueRequest(queue=queue)).queue.counts
            found = {name: getattr(counts, name) for name in step["expect"]}
            if found == step["expect"]:
                return
            if time.monotonic() > deadline:
                same("counts", found, step["expect"])
            time.sleep(0.02)

    def dead(self, step: dict[str, Any], queue: str) -> None:
        request = admin.ListTasksRequest(queue=queue, state=admin.TASK_STATE_DEAD)
        tasks = self.admin.ListTasks(request).tasks
        same("ids", [task.task.id for task in tasks], [self.ids[name] for name in step["expect"]["tasks"]])
        same("reasons", [task.last_error for task in tasks], step["expect"]["reasons"])

    def consume(self, step: dict[str, Any], queue: str) -> None:
        count, fail, reject = step["count"], set(step["fail"]), set(step["reject"])
        with dataqueue.Producer(self.address) as producer:
            producer.insert(queue, *(dataqueue.new_task({"n": n}) for n in range(count)))
        lock = threading.Lock()
        found = {"handled": 0, "failed": 0, "rejected": 0}
        wrong: list[str] = []
        running = most = 0

        def handler(task: dataqueue.Task) -> None:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)

        def after(task: dataqueue.Task) -> None:
            nonlocal running
            n = task.json()["n"]
            with lock:
                running -= 1
                if n in reject:
                    found["rejected"] += 1
                elif n in fail and task.failures == 0:
                    found["failed"] += 1
                else:
                    found["handled"] += 1
                    if n in fail and (task.failures, task.deliveries) != (1, 2):
                        wrong.append(f"{n} came again with {task.failures} failures")
                if found["handled"] + found["rejected"] == count:
                    worker.stop()
            if n in reject:
                raise dataqueue.Reject("not wanted")
            if n in fail and task.failures == 0:
                raise ValueError("the first time fails")

        worker = Flavour(
            self.flavour, queue, handler, 0.02, address=self.address, concurrency=step["concurrency"]
        )
        worker.after = after  # type: ignore[method-assign]
        self.run_within(worker)
        same("wrong deliveries", wrong, [])
        same("outcome", found, step["expect"])
        if not 1 < most <= step["concurrency"]:
            raise Failed(f"{most} handlers ran at once")

    def reconnect(self, step: dict[str, Any], queue: str) -> None:
        count, lock = step["count"], threading.Lock()
        handled: set[int] = set()
        acked: set[int] = set()

        def after(task: dataqueue.Task) -> None:
            with lock:
                before = len(handled)
                handled.add(task.json()["n"])
                if before < step["restart_after"] <= len(handled):
                    say("restart")

        def on_acked(task: dataqueue.Task) -> None:
            acked.add(task.json()["n"])
            if len(acked) == count:
                worker.stop()

        worker = Flavour(
            self.flavour, queue, lambda task: None, 0.01,
            address=self.address, concurrency=step["concurrency"], on_acked=on_acked,
        )
        worker.after = after  # type: ignore[method-assign]
        produced: list[BaseException] = []

        def produce() -> None:
            try:
                if self.flavour == "asyncio":
                    asyncio.run(self.produce_async(queue, count))
                else:
                    with dataqueue.Producer(self.address) as producer:
                        for n in range(count):
                            producer.insert(queue, dataqueue.new_task({"n": n}))
            except BaseException as error:
                produced.append(error)
                worker.stop()

        producer = threading.Thread(target=produce)
        producer.start()
        self.run_within(worker)
        producer.join()
        same("errors of the producer", [str(error) for error in produced], [])
        same("handled", len(handled & acked), step["expect"]["handled"])

    async def produce_async(self, queue: str, count: int) -> None:
        async with aio.Producer(self.address) as producer:
            for n in range(count):
                await producer.insert(queue, dataqueue.new_task({"n": n}))

    @staticmethod
    def run_within(worker: Flavour) -> None:
        """A worker that is not done in time is stopped: what it did is compared then."""
        timer = threading.Timer(PATIENCE, worker.stop)
        timer.start()
        worker.run()
        timer.cancel()


def work(arguments: argparse.Namespace) -> None:
    lock = threading.Lock()
    deliveries = 0
    failing: set[str] = set()

    def handler(task: dataqueue.Task) -> None:
        nonlocal deliveries
        with lock:
            deliveries += 1
            if arguments.fail_every and deliveries % arguments.fail_every == 0:
                failing.add(task.lease_token)
            say("delivered", task.id, task.lease_token, hashlib.md5(task.value).hexdigest())

    def after(task: dataqueue.Task) -> None:
        with lock:
            if task.lease_token in failing:
                failing.discard(task.lease_token)
                raise ValueError("as asked")

    def told(word: str) -> Callable[[dataqueue.Task], None]:
        def tell(task: dataqueue.Task) -> None:
            with lock:
                say(word, task.id, task.lease_token)

        return tell

    worker = Flavour(
        arguments.flavour, arguments.queue, handler, arguments.hold / 1000,
        address=arguments.addr, concurrency=arguments.concurrency, grace=arguments.grace / 1000,
        on_acked=told("acked"), on_lost=told("lost"),
    )
    worker.after = after  # type: ignore[method-assign]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    worker.run()
    say("stopped")


def main() -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    scenario = commands.add_parser("scenario")
    scenario.add_argument("--file", required=True)
    scenario.add_argument("--prefix", required=True)
    worker = commands.add_parser("work")
    worker.add_argument("--queue", required=True)
    worker.add_argument("--concurrency", type=int, default=16)
    worker.add_argument("--fail-every", type=int, default=0)
    worker.add_argument("--hold", type=float, default=0)
    worker.add_argument("--grace", type=float, default=30_000)
    for command in (scenario, worker):
        command.add_argument("--addr", required=True)
        command.add_argument("--flavour", choices=("threads", "asyncio"), default="threads")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR)
    if arguments.command == "work":
        work(arguments)
        return 0
    with open(arguments.file, encoding="utf-8") as file:
        steps = json.load(file)["steps"]
    return 0 if Scenario(arguments.addr, arguments.prefix, arguments.flavour).run(steps) else 1


if __name__ == "__main__":
    sys.exit(main())
