"""What a worker holds and owes, and what its streams say: all of the rules, and neither threads nor sockets.

`worker` and `aio` drive it. They tell it what happens, with the time; after each turn they do what it wants: open a stream, send
requests, run and cancel handlers. What was sent is kept until its answer comes; if the stream ends before, it is said again on
the next one, which has the same session and so takes over what is held.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Callable, Mapping, NamedTuple, Optional, Sequence, Union

import grpc

from .errors import Backoff, Error, Reject
from .task import Task
from .v1 import data_queue_pb2 as v1

log = logging.getLogger("dataqueue")

MAX_BATCH = 1_000
MAX_REASON_BYTES = 1_024
# How long answers are waited for once all is said.
FAREWELL = 5.0
# A stream that lived for less has proved nothing: drained, it is not replaced at once.
YOUNG = 1.0
# What the server does not extend is extended three times a lease and at least so often, for as long as the server would.
KEEP_EVERY = 20.0
MAX_HOLD = 3_600.0
# A token that no task has. Its answer tells that the stream is open, or that all before it was heard.
FENCE = "0" * 32

Queues = Union[str, Sequence[str], Mapping[str, int]]
Hook = Callable[[Task], None]


class Kind(Enum):
    ACK = 0
    PUTBACK = 1
    FAIL = 2
    REJECT = 3
    HEARTBEAT = 4


class Wish(NamedTuple):
    """What is wanted of tasks of one queue. Those that want the same go in one request."""

    kind: Kind
    queue: str
    reason: str = ""

    def request(self, tokens: list[str]) -> v1.ConsumeRequest:
        if self.kind is Kind.ACK:
            return v1.ConsumeRequest(ack=v1.ConsumeAck(queue=self.queue, lease_tokens=tokens))
        if self.kind is Kind.HEARTBEAT:
            return v1.ConsumeRequest(heartbeat=v1.ConsumeHeartbeat(queue=self.queue, lease_tokens=tokens))
        putback = v1.ConsumePutback(
            queue=self.queue,
            lease_tokens=tokens,
            reason=self.reason,
            failed=self.kind is Kind.FAIL,
            dead_letter=self.kind is Kind.REJECT,
        )
        return v1.ConsumeRequest(putback=putback)


class Signal(Enum):
    """Why a handler is cancelled."""

    DEADLINE = "its deadline passed"
    DELETED = "the task was deleted"
    LOST = "the lease was lost"
    STOPPED = "the worker stops"


@dataclass(eq=False)
class Hold:
    """A task that was delivered, and whose end the server has not confirmed."""

    task: Task
    stream: int
    since: float
    is_running: bool = False
    # Its ack or putback is on its way.
    is_settling: bool = False
    signal: Optional[Signal] = None


@dataclass(eq=False)
class Stream:
    id: int
    since: float
    # The max_outstanding that the server knows.
    told: int
    sent: deque[tuple[Wish, list[str]]] = field(default_factory=deque)
    is_heard: bool = False
    is_fenced: bool = False
    is_closed: bool = False


@dataclass(frozen=True)
class Options:
    queues: Mapping[str, int]
    concurrency: int
    lease: Optional[float]
    deadline: Optional[float]
    grace: float
    on_acked: Optional[Hook]
    on_lost: Optional[Hook]

    @staticmethod
    def named(queues: Queues) -> Mapping[str, int]:
        """One queue, several of the same weight, or each with its own."""
        if isinstance(queues, str):
            return {queues: 1}
        return dict(queues) if isinstance(queues, Mapping) else {name: 1 for name in queues}


def reason_of(error: BaseException) -> str:
    """The error's text, cut to what the server takes, and not within a character."""
    try:
        text = str(error) or type(error).__name__
    except Exception:
        text = type(error).__name__
    return text.encode("utf-8", "replace")[:MAX_REASON_BYTES].decode("utf-8", "ignore")


class Session:
    def __init__(self, options: Options) -> None:
        self.to_run: deque[Hold] = deque()
        self.to_cancel: deque[Hold] = deque()
        self.running = 0
        self.lost = 0
        self.error: Optional[Error] = None
        self._options = options
        self._name = os.urandom(16)
        self._holds: dict[str, Hold] = {}
        self._waiting: deque[Hold] = deque()
        # All handlers have the same time, so the first to begin is the first to be late.
        self._due: OrderedDict[Hold, float] = OrderedDict()
        self._pending: dict[Wish, list[str]] = {}
        self._streams: dict[int, Stream] = {}
        self._opening: Optional[Stream] = None
        self._current: Optional[Stream] = None
        self._open_at: Optional[float] = 0.0
        self._backoff = Backoff()
        # The session was lost to another stream, and none has brought anything since.
        self._was_taken_over = False
        self._made = 0
        self._lease = KEEP_EVERY
        self._keep_at: Optional[float] = None
        self._grace_ends_at: Optional[float] = None
        self._is_stopping = False
        self._ends_at: Optional[float] = None

    # What happens.

    def stop(self, now: float) -> None:
        """No more tasks are wanted. What no handler has seen goes back."""
        if self._is_stopping:
            return
        self._is_stopping = True
        self._grace_ends_at = now + self._options.grace
        while self._waiting:
            self._put_back(self._waiting.popleft())

    def fail(self, error: Error, now: float) -> None:
        """Ends all: no other stream helps against this error."""
        if self.error is None:
            self.error = error
            self._ends_at = now + FAREWELL
            self._waiting.clear()
            for hold in list(self._holds.values()):
                self._signal(hold, Signal.STOPPED)

    def receive(self, stream: int, response: v1.ConsumeResponse, now: float) -> None:
        line = self._streams.get(stream)
        if line is None or self.error is not None:
            return
        if not line.is_heard:
            line.is_heard = True
            # The server has accepted the stream. From now on all is said there.
            if line is self._opening:
                self._current, self._opening = line, None
            self._resume(line, response, now)
        for answer in response.answers:
            self._hear(line, answer, now)
        for message in response.tasks:
            self._deliver(line, message, now)
        for cancelled in response.cancel:
            for token in cancelled.lease_tokens:
                hold = self._holds.get(token)
                if hold is not None:
                    self._signal(hold, Signal.DELETED)
        if response.tasks or response.answers:
            self._backoff.reset()
            self._was_taken_over = False
        if response.drain and line is self._current and self._opening is None and self._open_at is None:
            self._open_at = now if now - line.since >= YOUNG else now + self._backoff.pause()

    def ended(self, stream: int, error: Optional[Error], now: float) -> None:
        """A stream is over; None is the server's OK. What was not answered is said again."""
        line = self._streams.pop(stream, None)
        if line is None:
            return
        for wish, tokens in line.sent:
            if wish.kind is not Kind.HEARTBEAT:
                for token in tokens:
                    self._ask(wish, token)
        # A stream that another has followed may end as it likes.
        was_left = self._opening is not None or self._open_at is not None
        if line is self._opening:
            self._opening = None
        elif line is self._current:
            self._current = None
            if was_left:
                return
        else:
            return
        # The session is this worker's alone: it was a stream of its own that was thought dead and came late. Once.
        is_taken_over = error is not None and error.reason == "SESSION_TAKEN_OVER"
        helps = is_taken_over and not self._was_taken_over
        self._was_taken_over = self._was_taken_over or is_taken_over
        if error is not None and not helps and not error.is_passing and error.code is not grpc.StatusCode.INTERNAL:
            self.fail(error, now)
            return
        pause = self._backoff.pause(error)
        self._open_at = now + pause
        if not (self._is_stopping and line.is_closed):
            log.info("the stream ended (%s); another one in %.1f s", error or "by the server, with OK", pause)

    def finished(self, hold: Hold, error: Optional[BaseException], now: float) -> None:
        """A handler has ended: it returned, or this is what it raised."""
        self.running -= 1
        hold.is_running = False
        self._due.pop(hold, None)
        if hold.is_settling or self.error is not None:
            return
        task = hold.task
        if hold.signal is Signal.DEADLINE:
            reason = f"deadline of {self._options.deadline:g} s passed"
            log.warning("task %s of %s failed: %s", task.id, task.queue, reason)
            self._settle(hold, Wish(Kind.FAIL, task.queue, reason))
        elif error is None:
            self._settle(hold, Wish(Kind.ACK, task.queue))
        elif hold.signal is not None:
            self._put_back(hold)
        elif isinstance(error, Reject):
            self._settle(hold, Wish(Kind.REJECT, task.queue, reason_of(error)))
        else:
            log.warning("task %s of %s failed", task.id, task.queue, exc_info=error)
            self._settle(hold, Wish(Kind.FAIL, task.queue, reason_of(error)))

    def tick(self, now: float) -> None:
        """Does what is due by now, and starts what there is room for."""
        while self._due and next(iter(self._due.values())) <= now:
            self._signal(self._due.popitem(last=False)[0], Signal.DEADLINE)
        if self._keep_at is not None and now >= self._keep_at:
            self._keep(now)
        if self._grace_ends_at is not None and now >= self._grace_ends_at:
            self._grace_ends_at = None
            for hold in [hold for hold in self._holds.values() if not hold.is_settling]:
                self._signal(hold, Signal.STOPPED)
                self._put_back(hold)
        if self._is_stopping and self._ends_at is None and all(hold.is_settling for hold in self._holds.values()):
            self._ends_at = now + FAREWELL
        while self._waiting and self.running < self._options.concurrency:
            hold = self._waiting.popleft()
            hold.is_running = True
            self.running += 1
            if self._options.deadline is not None:
                self._due[hold] = now + self._options.deadline
            self.to_run.append(hold)
        # More than that wait only if the server takes some that run for lost.
        while len(self._waiting) > self._options.concurrency:
            self._put_back(self._waiting.popleft())

    # What is wanted.

    def wake_at(self) -> Optional[float]:
        """When to call `tick` at the latest."""
        opens = None if self._opening is not None or self._is_finished() else self._open_at
        times = (next(iter(self._due.values()), None), self._keep_at, self._grace_ends_at, self._ends_at, opens)
        return min((time for time in times if time is not None), default=None)

    def is_over(self, now: float) -> bool:
        if self._ends_at is not None and now >= self._ends_at:
            if self._is_owing():
                log.warning("the worker ends with %d tasks whose acks or putbacks were not confirmed", len(self._holds))
            return True
        if self.error is not None:
            return self.running == 0
        return self._is_finished() and not self._streams and self.running == 0

    def open(self, now: float) -> Optional[tuple[int, list[v1.ConsumeRequest]]]:
        """The number and first messages of a stream, if one is to be opened now."""
        is_due = self._open_at is not None and now >= self._open_at and self._opening is None
        if not is_due or self.error is not None or self._is_finished():
            return None
        self._open_at = None
        self._made += 1
        # A stream cannot be opened with less than 1. What is really wanted is said behind it.
        told = 1 if self._is_stopping else self._options.concurrency
        self._opening = self._streams[self._made] = Stream(self._made, now, told)
        queues = [v1.ConsumeQueue(name=name, weight=weight) for name, weight in self._options.queues.items()]
        message = v1.ConsumeOpen(queues=queues, max_outstanding=told, session=self._name)
        if self._options.lease is not None:
            message.lease.FromNanoseconds(round(self._options.lease * 1e9))
        # The server's first message tells what was taken over, and comes when there is something to say.
        fence = self._fence()
        self._opening.sent.append((fence, [FENCE]))
        return self._made, [v1.ConsumeRequest(open=message), fence.request([FENCE])]

    def requests(self) -> tuple[int, list[Optional[v1.ConsumeRequest]]]:
        """What is to be sent, and on which stream; None at its end is the half-close."""
        line = self._current
        if line is None or line.is_closed or self.error is not None:
            return 0, []
        requests: list[Optional[v1.ConsumeRequest]] = []
        wanted = 0 if self._is_stopping else self._options.concurrency
        if line.told != wanted:
            line.told = wanted
            requests.append(v1.ConsumeRequest(max_outstanding=wanted))
        if self._is_stopping and not line.is_fenced:
            line.is_fenced = True
            self._ask(self._fence(), FENCE)
        for wish, tokens in self._pending.items():
            for at in range(0, len(tokens), MAX_BATCH):
                batch = tokens[at : at + MAX_BATCH]
                line.sent.append((wish, batch))
                requests.append(wish.request(batch))
        self._pending.clear()
        if self._is_finished():
            line.is_closed = True
            requests.append(None)
        return line.id, requests

    # How it is done.

    def _is_owing(self) -> bool:
        return bool(self._holds or self._pending or any(line.sent for line in self._streams.values()))

    def _is_finished(self) -> bool:
        return self._is_stopping and not self._is_owing()

    def _fence(self) -> Wish:
        return Wish(Kind.HEARTBEAT, next(iter(self._options.queues)))

    def _ask(self, wish: Wish, token: str) -> None:
        self._pending.setdefault(wish, []).append(token)

    def _settle(self, hold: Hold, wish: Wish) -> None:
        hold.is_settling = True
        self._ask(wish, hold.task.lease_token)

    def _put_back(self, hold: Hold) -> None:
        self._settle(hold, Wish(Kind.PUTBACK, hold.task.queue))

    def _signal(self, hold: Hold, signal: Signal) -> None:
        """Cancels the handler; what no handler has seen yet goes back. Only the first signal counts."""
        if hold.is_settling or hold.signal is not None:
            return
        hold.signal = signal
        if hold.is_running:
            hold.task.cancelled_because = signal.value
            hold.task.cancelled.set()
            self.to_cancel.append(hold)
        elif hold in self._waiting:
            self._waiting.remove(hold)
            self._put_back(hold)

    def _resume(self, line: Stream, response: v1.ConsumeResponse, now: float) -> None:
        """Notes what the stream took over. What is not known here was lost on its way and goes back, and so does what is known,
        was not taken over, and has been seen by no handler."""
        for resumed in response.resumed:
            for token in resumed.lease_tokens:
                hold = self._holds.get(token)
                if hold is None:
                    self._ask(Wish(Kind.PUTBACK, resumed.queue), token)
                else:
                    hold.stream = line.id
        for hold in [hold for hold in self._waiting if hold.stream != line.id]:
            self._waiting.remove(hold)
            self._put_back(hold)
        self._keep(now)

    def _left_over(self, now: float) -> list[str]:
        """What runs and was not taken over by the stream that lives. A server that was started again may have forgotten whose it
        is, though the leases are good: its answers tell."""
        current = self._current.id if self._current else 0
        running = [hold for hold in self._holds.values() if hold.is_running and not hold.is_settling]
        left = [hold for hold in running if hold.stream != current and hold.signal is not Signal.LOST]
        return [hold.task.lease_token for hold in left if now < hold.since + MAX_HOLD]

    def _keep_every(self) -> float:
        return min(max(self._lease / 3, 0.03), KEEP_EVERY)

    def _keep(self, now: float) -> None:
        tokens = self._left_over(now)
        self._keep_at = now + self._keep_every() if tokens else None
        if self._current is not None:
            for token in tokens:
                self._ask(Wish(Kind.HEARTBEAT, self._holds[token].task.queue), token)

    def _hear(self, line: Stream, answer: v1.ConsumeAnswer, now: float) -> None:
        """Takes the answer to the first request of the stream that has none."""
        wish, tokens = line.sent.popleft() if line.sent else (None, [])
        if wish is None or len(tokens) != len(answer.outcomes):
            self.fail(Error(grpc.StatusCode.INTERNAL, "the server answered what it was not asked"), now)
            return
        for token, outcome in zip(tokens, answer.outcomes):
            is_lost = outcome == v1.OUTCOME_LEASE_LOST
            if wish.kind is Kind.HEARTBEAT:
                hold = self._holds.get(token)
                if is_lost and hold is not None:
                    self._signal(hold, Signal.LOST)
                continue
            hold = self._holds.pop(token, None)
            if hold is not None and wish.kind is Kind.ACK:
                self._note_ack(hold.task, is_lost)

    def _note_ack(self, task: Task, is_lost: bool) -> None:
        if is_lost:
            self.lost += 1
            log.warning("the lease of task %s of %s was lost before its ack: it is delivered again", task.id, task.queue)
        hook = self._options.on_lost if is_lost else self._options.on_acked
        if hook is not None:
            try:
                hook(task)
            except Exception:
                log.exception("a hook of the worker failed")

    def _deliver(self, line: Stream, message: v1.Task, now: float) -> None:
        known = self._holds.get(message.lease_token)
        if known is not None:
            # It is handed out once, whatever comes.
            known.stream = line.id
            return
        self._lease = message.lease.ToTimedelta().total_seconds() or self._lease
        hold = self._holds[message.lease_token] = Hold(Task(message), line.id, now)
        if not hold.task.is_whole():
            log.error("task %s of %s arrived damaged", message.id, message.queue)
            self._settle(hold, Wish(Kind.FAIL, message.queue, "the value arrived damaged: its md5 is another one"))
        elif self._is_stopping:
            self._put_back(hold)
        else:
            self._waiting.append(hold)
