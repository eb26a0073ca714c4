"""The rules of a worker, message by message: what a real server does seldom."""

from __future__ import annotations

import hashlib

import grpc

from dataqueue import Error, Reject
from dataqueue._session import Options, Session
from dataqueue.v1 import data_queue_pb2 as v1

UNAVAILABLE = Error(grpc.StatusCode.UNAVAILABLE, "gone")


def task(token: str, value: bytes = b"x", md5: str = "") -> v1.Task:
    md5 = md5 or hashlib.md5(value).hexdigest()
    return v1.Task(id=token, queue="q", lease_token=token, data=value, md5=md5, deliveries=1)


class Driven:
    """A session whose time and messages are given."""

    def __init__(self, **options) -> None:
        self.acked: list[str] = []
        self.lost: list[str] = []
        settings = {
            "queues": {"q": 1}, "concurrency": 4, "lease": None, "deadline": None, "grace": 30.0,
            "on_acked": lambda task: self.acked.append(task.id), "on_lost": lambda task: self.lost.append(task.id),
        }  # fmt: skip
        self.session = Session(Options(**{**settings, **options}))
        self.now = 100.0
        self.stream = 0

    def begin(self) -> v1.ConsumeOpen:
        """A stream that the server has not heard of yet."""
        self.now += 3.0
        opening = self.session.open(self.now)
        assert opening is not None
        self.stream, (first, fence) = opening
        assert len(fence.heartbeat.lease_tokens) == 1
        return first.open

    def open(self, *resumed: str) -> v1.ConsumeOpen:
        """A stream, and its first answer."""
        open = self.begin()
        taken_over = [v1.ResumedQueue(queue="q", lease_tokens=resumed)]
        answers = [v1.ConsumeAnswer(outcomes=[v1.OUTCOME_LEASE_LOST])]
        assert self.receive(answers=answers, resumed=taken_over) == []
        return open

    def receive(self, stream: int = 0, **parts) -> list:
        """What of tasks then begins."""
        self.session.receive(stream or self.stream, v1.ConsumeResponse(**parts), self.now)
        self.session.tick(self.now)
        begun = list(self.session.to_run)
        self.session.to_run.clear()
        return begun

    def answer(self, *outcomes: int) -> None:
        self.receive(answers=[v1.ConsumeAnswer(outcomes=[outcome]) for outcome in outcomes])

    def said(self) -> list:
        return self.session.requests()[1]

    def ends(self, error=UNAVAILABLE, stream: int = 0) -> None:
        self.session.ended(stream or self.stream, error, self.now)


def acks(requests: list) -> list[str]:
    return [token for request in requests for token in request.ack.lease_tokens]


def putbacks(requests: list) -> list[str]:
    return [token for request in requests for token in request.putback.lease_tokens]


def heartbeats(requests: list) -> list[str]:
    return [token for request in requests for token in request.heartbeat.lease_tokens]


def test_a_damaged_task_is_put_back_as_failed_and_no_handler_sees_it() -> None:
    driven = Driven()
    driven.open()
    assert driven.receive(tasks=[task("a", md5="0" * 32)]) == []
    (request,) = driven.said()
    assert (request.putback.lease_tokens, request.putback.failed) == (["a"], True)
    assert "damaged" in request.putback.reason


def test_an_ack_that_was_not_answered_is_said_again_and_an_earlier_one_is_success() -> None:
    driven = Driven()
    first = driven.open()
    (hold,) = driven.receive(tasks=[task("a")])
    driven.session.finished(hold, None, driven.now)
    assert acks(driven.said()) == ["a"]
    driven.ends()
    assert driven.said() == []
    assert driven.open().session == first.session and len(first.session) == 16
    assert acks(driven.said()) == ["a"]
    driven.answer(v1.OUTCOME_ALREADY_ACKED)
    assert (driven.acked, driven.lost) == (["a"], [])


def test_an_ack_that_comes_too_late_is_counted_and_told() -> None:
    driven = Driven()
    driven.open()
    (hold,) = driven.receive(tasks=[task("a")])
    driven.session.finished(hold, None, driven.now)
    driven.said()
    driven.answer(v1.OUTCOME_LEASE_LOST)
    assert (driven.acked, driven.lost, driven.session.lost) == ([], ["a"], 1)


def test_what_was_lost_on_its_way_is_put_back_and_what_is_held_is_not_handed_out_twice() -> None:
    driven = Driven()
    driven.open()
    (hold,) = driven.receive(tasks=[task("a")])
    driven.ends()
    driven.open("a", "unknown")
    assert driven.receive(tasks=[task("a")]) == []
    said = driven.said()
    assert (putbacks(said), heartbeats(said)) == (["unknown"], [])
    assert not hold.task.cancelled.is_set()


def test_a_lease_that_is_lost_over_a_reconnect_cancels_the_handler_and_its_ack_is_tried_all_the_same() -> None:
    driven = Driven()
    driven.open()
    (hold,) = driven.receive(tasks=[task("a")])
    driven.ends()
    driven.open()
    assert heartbeats(driven.said()) == ["a"]
    driven.answer(v1.OUTCOME_LEASE_LOST)
    assert hold.task.cancelled_because == "the lease was lost"
    driven.session.finished(hold, None, driven.now)
    assert acks(driven.said()) == ["a"]


def test_what_a_restarted_server_has_forgotten_is_extended_by_the_worker() -> None:
    driven = Driven()
    driven.open()
    driven.receive(tasks=[task("a")])
    driven.ends()
    driven.open()
    driven.said()
    driven.answer(v1.OUTCOME_APPLIED)
    due = driven.session.wake_at()
    assert due is not None and due - driven.now <= 20
    driven.now = due
    driven.session.tick(due)
    assert heartbeats(driven.said()) == ["a"]


def test_more_is_never_run_than_is_allowed_and_what_waits_goes_back_at_a_stop() -> None:
    driven = Driven(concurrency=2)
    driven.open()
    begun = driven.receive(tasks=[task("a"), task("b"), task("c")])
    assert [hold.task.id for hold in begun] == ["a", "b"]
    driven.session.stop(driven.now)
    said = driven.said()
    assert said[0].WhichOneof("request") == "max_outstanding" and said[0].max_outstanding == 0
    assert putbacks(said) == ["c"]
    assert putbacks(driven.said()) == []
    driven.receive(tasks=[task("d")])
    assert putbacks(driven.said()) == ["d"]


def test_a_stream_that_drains_is_followed_by_one_of_the_same_session_while_handlers_run() -> None:
    driven = Driven()
    first = driven.open()
    (hold,) = driven.receive(tasks=[task("a")])
    old = driven.stream
    driven.now += 5
    driven.receive(drain=True)
    driven.session.finished(hold, None, driven.now)
    assert acks(driven.said()) == ["a"]
    assert driven.open().session == first.session
    driven.receive(stream=old, answers=[v1.ConsumeAnswer(outcomes=[v1.OUTCOME_APPLIED])])
    assert driven.acked == ["a"]
    driven.ends(Error(grpc.StatusCode.ABORTED, "taken over", reason="SESSION_TAKEN_OVER"), stream=old)
    assert driven.session.error is None


def test_a_stream_that_drains_is_spoken_on_until_the_server_has_answered_on_another() -> None:
    driven = Driven()
    driven.open()
    (hold,) = driven.receive(tasks=[task("a")])
    old = driven.stream
    driven.now += 5
    driven.receive(drain=True)
    driven.begin()
    driven.ends()
    driven.begin()
    driven.session.finished(hold, None, driven.now)
    line, said = driven.session.requests()
    assert (line, acks(said)) == (old, ["a"])


def test_a_handler_that_takes_long_does_not_keep_what_has_ended_in_memory() -> None:
    driven = Driven(deadline=3_600.0)
    driven.open()
    driven.receive(tasks=[task("long")])
    for n in range(100):
        (hold,) = driven.receive(tasks=[task(f"{n}")])
        driven.session.finished(hold, None, driven.now)
        driven.said()
        driven.answer(v1.OUTCOME_APPLIED)
    assert len(driven.session._due) == len(driven.session._holds) == 1


def test_a_session_that_was_taken_over_is_opened_again_once() -> None:
    error = Error(grpc.StatusCode.ABORTED, "taken over", reason="SESSION_TAKEN_OVER")
    driven = Driven()
    driven.open()
    for _ in range(2):
        driven.ends(error)
        assert driven.session.error is None
        driven.open()
    driven.ends(error)
    driven.begin()
    driven.ends(error)
    assert driven.session.error is error and driven.session.is_over(driven.now)


def test_refusals_end_the_worker_and_a_passing_error_does_not() -> None:
    for error in (
        Error(grpc.StatusCode.INVALID_ARGUMENT, "no", reason="CONSUME_INVALID"),
        Error(grpc.StatusCode.UNIMPLEMENTED, "no"),
        Error(grpc.StatusCode.PERMISSION_DENIED, "no"),
    ):
        driven = Driven()
        driven.open()
        driven.ends(error)
        assert driven.session.error is error and driven.session.is_over(driven.now)
    for error in (
        None,
        UNAVAILABLE,
        Error(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", reason="OVERLOADED", retry_after=0.1),
        Error(grpc.StatusCode.UNAVAILABLE, "stops", reason="SHUTTING_DOWN", retry_after=0.2),
        Error(grpc.StatusCode.INTERNAL, "a bug", reason="INTERNAL"),
    ):
        driven = Driven()
        driven.open()
        driven.ends(error)
        assert driven.session.error is None and driven.open()


def test_the_server_says_how_long_to_wait() -> None:
    driven = Driven()
    driven.open()
    driven.ends(Error(grpc.StatusCode.UNAVAILABLE, "away", reason="STORE_UNAVAILABLE", retry_after=7.0))
    wake_at = driven.session.wake_at()
    assert wake_at is not None and 7.0 <= wake_at - driven.now <= 9.0


def test_what_ends_alike_goes_in_one_request_and_never_more_than_1000() -> None:
    driven = Driven(concurrency=2_000)
    driven.open()
    begun = driven.receive(tasks=[task(f"{n}") for n in range(1_502)])
    for hold in begun[2:]:
        driven.session.finished(hold, None, driven.now)
    for hold in begun[:2]:
        driven.session.finished(hold, Reject("no"), driven.now)
    said = driven.said()
    assert [len(request.ack.lease_tokens) for request in said] == [1_000, 500, 0]
    assert (said[2].putback.lease_tokens, said[2].putback.dead_letter) == (["0", "1"], True)
