"""What a producer promises, with threads and with asyncio."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
from conftest import Server, eventually

import dataqueue
from dataqueue import aio, new_task
from dataqueue.v1 import data_queue_pb2 as v1


def inserted(server: Server) -> int:
    try:
        return server.counts("q").inserted
    except grpc.RpcError:
        return 0


async def insert_each_async(address: str, count: int, ids: list[str]) -> None:
    async with aio.Producer(address) as producer:
        for n in range(count):
            ids.extend(result.id for result in await producer.insert("q", new_task(n)))


def insert_each(address: str, count: int, ids: list[str]) -> None:
    with dataqueue.Producer(address) as producer:
        for n in range(count):
            ids.extend(result.id for result in producer.insert("q", new_task(n)))


@pytest.mark.parametrize("flavour", ["threads", "asyncio"])
def test_over_a_killed_server_each_insert_is_done_once(server: Server, flavour: str) -> None:
    ids: list[str] = []

    def produce() -> None:
        if flavour == "asyncio":
            asyncio.run(insert_each_async(server.address, 200, ids))
        else:
            insert_each(server.address, 200, ids)

    producer = threading.Thread(target=produce)
    producer.start()
    for some in (40, 120):
        eventually(f"{some} are inserted", lambda: len(ids) >= some)
        server.kill()
        server.start()
    producer.join()
    assert len(set(ids)) == 200
    assert server.counts("q").inserted == server.counts("q").ready == 200


def test_an_insert_waits_for_its_server_and_is_said_again_with_its_request_id(server: Server) -> None:
    server.kill()
    ids: list[str] = []
    producer = threading.Thread(target=insert_each, args=(server.address, 1, ids))
    producer.start()
    server.start()
    producer.join()
    assert len(ids) == 1
    with dataqueue.Producer(server.address) as again:
        first = again.insert("q", new_task("x"), request_id="one")
        assert again.insert("q", new_task("x"), request_id="one") == first
    assert server.counts("q").inserted == 2


def test_a_refusal_is_raised_at_once_with_its_reason_and_field(server: Server) -> None:
    with dataqueue.Producer(server.address) as producer:
        with pytest.raises(dataqueue.Error) as raised:
            producer.insert("q", new_task(1), v1.NewTask(json="{"))
    error = raised.value
    assert (error.code, error.reason, error.field) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "JSON_INVALID",
        "tasks[1].json",
    )
    assert str(error).startswith("INVALID_ARGUMENT JSON_INVALID at tasks[1].json: ")


def test_when_the_time_is_over_the_last_error_is_raised(server: Server) -> None:
    server.kill()
    with dataqueue.Producer(server.address, timeout=0.3) as producer:
        with pytest.raises(dataqueue.Error) as raised:
            producer.insert("q", new_task(1))
        assert raised.value.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        with pytest.raises(ValueError):
            producer.insert("q", new_task(1), timeout=300)


def test_a_batcher_inserts_each_task_once_and_tells_its_id(server: Server) -> None:
    with dataqueue.Producer(server.address) as producer, producer.batcher("q") as batcher:
        futures = [batcher.add(new_task(n)) for n in range(3_500)]
        batcher.flush()
        assert all(future.done() for future in futures)
        twice = [batcher.add(new_task(n, unique_key="one")).result() for n in range(2)]
    assert len({future.result().id for future in futures}) == 3_500
    assert twice[0].id == twice[1].id and [result.duplicate for result in twice] == [False, True]
    assert server.counts("q").ready == 3_501


def test_a_batcher_with_one_insert_in_flight_keeps_the_order_and_the_bounds(server: Server) -> None:
    values = [bytes([n]) * 400_000 for n in range(8)]
    with dataqueue.Producer(server.address) as producer, producer.batcher("q", in_flight=1) as batcher:
        for value in values:
            batcher.add(new_task(value))
    popped = server.queues.PopBatch(v1.PopBatchRequest(queue="q", max_tasks=100))
    assert [task.data for response in popped for task in response.tasks] == values


def test_a_batcher_fails_what_was_refused(server: Server) -> None:
    with dataqueue.Producer(server.address) as producer, producer.batcher("q") as batcher:
        future = batcher.add(v1.NewTask(json="{"))
        assert isinstance(future.exception(), dataqueue.Error)
        assert batcher.add(new_task(1)).result().duplicate is False


def test_an_asyncio_batcher_inserts_each_task_once_and_tells_its_id(server: Server) -> None:
    async def produce() -> None:
        async with aio.Producer(server.address) as producer:
            async with producer.batcher("q") as batcher:
                results = [await batcher.add(new_task(n)) for n in range(12_000)]
            assert len({(await result).id for result in results}) == 12_000
            async with producer.batcher("q", in_flight=1) as batcher:
                refused = await batcher.add(v1.NewTask(json="{"))
                with pytest.raises(dataqueue.Error):
                    await refused
            with pytest.raises(RuntimeError):
                await batcher.add(new_task(1))

    asyncio.run(produce())
    assert server.counts("q").ready == 12_000
