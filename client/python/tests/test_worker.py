"""What a worker promises, with threads and with asyncio, over real servers that are killed meanwhile."""

from __future__ import annotations

import threading

import grpc
import pytest
from conftest import Running, Server, eventually

import dataqueue
from dataqueue.v1 import queue_admin_pb2 as admin

NEVER = threading.Event()


async def nothing(task, until):
    pass


def test_what_returns_is_acked_what_raises_fails_and_what_is_rejected_is_dead(server: Server, run) -> None:
    async def handler(task, until):
        if task.json() == "fail" and task.failures == 0:
            raise ValueError("the first time fails")
        if task.json() == "reject":
            raise dataqueue.Reject("not wanted")
        seen.append((task.json(), task.failures, dict(task.headers)))

    seen: list[object] = []
    good, fails, rejected = server.insert("q", "good", "fail", "reject")
    worker = run(server.address, "q", handler)
    eventually("all are done", lambda: set(worker.acked) == {good, fails} and server.counts("q").dead == 1)
    worker.end()
    assert seen == [("good", 0, {}), ("fail", 1, {})]
    assert server.task("q", rejected).last_error == "not wanted"
    assert server.counts("q").acked == 2


def test_a_long_reason_is_cut_to_1024_bytes_and_not_within_a_character(server: Server, run) -> None:
    async def handler(task, until):
        raise dataqueue.Reject("x" + "é" * 2_000)

    (id,) = server.insert("q", 1)
    run(server.address, "q", handler)
    eventually("it is dead", lambda: server.counts("q").dead == 1)
    assert server.task("q", id).last_error == "x" + "é" * 511


def test_past_its_deadline_a_handler_is_cancelled_and_has_failed(server: Server, run) -> None:
    async def handler(task, until):
        if task.failures == 0:
            await until(NEVER)

    (id,) = server.insert("q", 1)
    worker = run(server.address, "q", handler, deadline=0.2)
    eventually("the second delivery is acked", lambda: worker.acked == [id])
    assert server.counts("q").acked == 1


def test_a_handler_that_returns_after_its_deadline_is_not_acked(server: Server, run) -> None:
    async def handler(task, until):
        try:
            await until(NEVER)
        except BaseException:  # It takes its cancellation for a success.
            pass

    server.admin.UpdateQueue(
        admin.UpdateQueueRequest(
            queue="q", settings=admin.QueueSettings(max_failures=1), update_mask={"paths": ["max_failures"]}
        )
    )
    (id,) = server.insert("q", 1)
    worker = run(server.address, "q", handler, deadline=0.25)
    eventually("it is dead", lambda: server.counts("q").dead == 1)
    assert server.task("q", id).last_error == "deadline of 0.25 s passed"
    assert worker.acked == []


def test_a_deleted_task_cancels_its_handler_and_is_gone(server: Server, run) -> None:
    async def handler(task, until):
        began.set()
        try:
            await until(NEVER)
        finally:
            ended.append(task.cancelled_because)

    began, ended = threading.Event(), []
    (id,) = server.insert("q", 1)
    run(server.address, "q", handler, lease=0.3)
    eventually("it runs", began.is_set)
    server.admin.DeleteTasks(admin.DeleteTasksRequest(queue="q", ids=[id]))
    eventually("the handler was told", lambda: ended == ["the task was deleted"])
    counts = eventually("it is gone", lambda: (c := server.counts("q")).leased == 0 and c)
    assert (counts.ready, counts.scheduled, counts.dead, counts.acked) == (0, 0, 0, 0)


def test_over_a_killed_server_nothing_is_lost_and_nothing_acked_that_did_not_finish(server: Server, run) -> None:
    lock, finished = threading.Lock(), set()

    async def handler(task, until):
        if task.json() % 7 == 0 and task.failures == 0:
            raise ValueError("now and then one fails")
        with lock:
            finished.add(task.id)

    ids: list[str] = []

    def produce() -> None:
        with dataqueue.Producer(server.address) as producer:
            for n in range(300):
                ids.append(producer.insert("q", dataqueue.new_task(n))[0].id)

    producer = threading.Thread(target=produce)
    worker = run(server.address, "q", handler)
    producer.start()
    for some in (60, 160):
        eventually(f"{some} are done", lambda: len(set(worker.acked)) >= some)
        server.kill()
        server.start()
    producer.join()
    eventually("all are done", lambda: len(set(worker.acked)) == 300)
    worker.end()
    assert set(worker.acked) == set(ids) == finished
    counts = server.counts("q")
    assert (counts.inserted, counts.acked, counts.ready, counts.scheduled, counts.leased) == (300, 300, 0, 0, 0)


def test_a_handler_that_runs_over_a_restart_keeps_its_task(server: Server, run) -> None:
    async def handler(task, until):
        began.set()
        if task.json() == "long":
            await until(go_on)

    began, go_on = threading.Event(), threading.Event()
    (id,) = server.insert("q", "long")
    worker = run(server.address, "q", handler)
    eventually("it runs", began.is_set)
    server.kill()
    server.start()
    (other,) = server.insert("q", "short")
    eventually("the worker is back", lambda: worker.acked == [other])
    go_on.set()
    eventually("it is acked", lambda: worker.acked == [other, id])
    worker.end()
    assert worker.worker.lost == 0
    assert server.counts("q").acked == 2


def test_a_worker_may_be_there_before_its_server(server: Server, run) -> None:
    server.kill()
    worker = run(server.address, "q", nothing)
    server.start()
    ids = server.insert("q", *range(5))
    eventually("all are done", lambda: set(worker.acked) == set(ids))


def test_a_stop_lets_handlers_finish_and_takes_no_more(server: Server, run) -> None:
    async def handler(task, until):
        began.append(task.id)
        await until(go_on)

    began, go_on = [], threading.Event()
    ids = server.insert("q", *range(10))
    worker = run(server.address, "q", handler, concurrency=3)
    eventually("three run", lambda: len(began) == 3)
    worker.stop()
    eventually("no more are taken", lambda: server.counts("q").leased == 3)
    go_on.set()
    worker.join()
    assert worker.error is None
    assert set(worker.acked) == set(began) == set(ids[:3])
    counts = server.counts("q")
    assert (counts.acked, counts.ready, counts.leased, counts.scheduled) == (3, 7, 0, 0)


def test_what_still_runs_after_the_grace_is_cancelled_and_given_back_uncounted(server: Server, run) -> None:
    async def handler(task, until):
        began.append(task.id)
        await until(NEVER)

    began: list[str] = []
    ids = server.insert("q", *range(4))
    worker = run(server.address, "q", handler, concurrency=2, grace=0.2)
    eventually("two run", lambda: len(began) == 2)
    worker.end()
    counts = server.counts("q")
    assert (counts.acked, counts.ready, counts.leased, worker.acked) == (0, 4, 0, [])
    tasks = [server.task("q", id) for id in ids]
    assert all(task.task.failures == 0 and task.task.expiries == 0 and task.last_error == "" for task in tasks)


def test_a_handler_that_never_ends_does_not_keep_the_worker_from_ending(server: Server, run) -> None:
    async def handler(task, until):
        began.set()
        while not go_on.is_set():
            try:
                await until(go_on)
            except BaseException:
                pass

    began, go_on = threading.Event(), threading.Event()
    server.insert("q", 1)
    worker = run(server.address, "q", handler, grace=0.1)
    eventually("it runs", began.is_set)
    worker.stop()
    eventually("it is given back", lambda: server.counts("q").ready == 1)
    if worker.loop is None:
        worker.join()
        assert worker.error is None
    go_on.set()


@pytest.mark.parametrize(
    "queue, options, reason, field",
    [
        ("not a name", {}, "QUEUE_NAME_INVALID", "open.queues[0].name"),
        ("q", {"lease": 0.001}, "LEASE_OUT_OF_RANGE", "open.lease"),
    ],
)
def test_a_refusal_ends_the_run_and_says_why(server: Server, run, queue, options, reason, field) -> None:
    worker = run(server.address, queue, nothing, **options)
    worker.join()
    error = worker.error
    assert isinstance(error, dataqueue.Error), error
    assert (error.code, error.reason, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, reason, field)
    assert str(error).startswith(f"INVALID_ARGUMENT {reason} at {field}: ")


def test_several_queues_are_worked_on_by_one_worker(server: Server, run) -> None:
    ids = server.insert("a", *range(20)) + server.insert("b", *range(20))
    worker: Running = run(server.address, {"a": 3, "b": 1}, nothing)
    eventually("all are done", lambda: set(worker.acked) == set(ids))
