package dataqueue

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"

	dataqueuev1 "dataqueue/v1"
)

const (
	maxReason = 1_024
	maxTokens = 1_000
	// How long a stream may take to open.
	openWithin = 20 * time.Second
	// How long a stream that another one replaced may take for the answers that it owes.
	farewell = time.Second
	// A stream that lived for less has proved nothing: drained, it is not replaced at once.
	young = time.Second
	// How long handlers that were cancelled at the end of the grace may take, before their tasks are put back without them.
	cutAfter = time.Second
	// How long the last answers are awaited.
	answersWithin = 5 * time.Second
)

// session is one run of a worker. All of it belongs to the goroutine of Run; streams and handlers tell it what happens.
type session struct {
	Worker
	open *dataqueuev1.ConsumeOpen
	base context.Context

	held map[string]*hold
	// What has come and waits for a handler.
	waiting []*hold
	running int
	// What is to be said, until a stream takes it.
	unsaid []ask

	// The stream that is spoken on; one that is being opened to replace it; and the one that was replaced.
	current, next, old *stream
	pauses             pauses
	// The session was lost to another stream, and none has brought anything since.
	wasTakenOver       bool
	openAt, farewellAt time.Time

	isStopping, isCut         bool
	cancelAt, cutAt, giveUpAt time.Time

	events   chan event
	finished chan finish
	done     chan struct{}
}

// hold is a task that is held: its end is not confirmed yet.
type hold struct {
	task   *Task
	cancel context.CancelCauseFunc
	// The last stream that delivered it or took it over.
	stream *stream
	state  state
}

type state int

const (
	waits state = iota
	runs
	// What becomes of it is on its way to the server.
	settles
)

type finish struct {
	hold    *hold
	verdict Verdict
	reason  string
}

// loop is the only place that waits.
func (s *session) loop(stop <-chan struct{}) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if s.advance(time.Now()) {
			return nil
		}
		if at := s.alarm(); at.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(at))
		}
		select {
		case <-stop:
			stop = nil
			s.stop()
		case event := <-s.events:
			if err := s.take(event); err != nil {
				return err
			}
		case finish := <-s.finished:
			s.running--
			s.settle(finish.hold, finish.verdict, finish.reason)
		case <-timer.C:
		}
	}
}

// alarm is when time alone changes something. Zero: never.
func (s *session) alarm() time.Time {
	alarms := []time.Time{s.openAt, s.farewellAt, s.cancelAt, s.cutAt, s.giveUpAt}
	if s.next != nil {
		alarms = append(alarms, s.next.since.Add(openWithin))
	}
	alarms = slices.DeleteFunc(alarms, time.Time.IsZero)
	if len(alarms) == 0 {
		return time.Time{}
	}
	return slices.MinFunc(alarms, time.Time.Compare)
}

// advance does what is due. True: it is the end.
func (s *session) advance(now time.Time) bool {
	if due(&s.openAt, now) {
		s.dial()
	}
	if s.next != nil && now.After(s.next.since.Add(openWithin)) {
		s.broken(s.next, &Error{Code: codes.DeadlineExceeded, Message: "the stream did not open in time"})
	}
	if due(&s.farewellAt, now) {
		s.lose(s.old)
	}
	if due(&s.cancelAt, now) {
		s.cutAt = now.Add(cutAfter)
		s.cancelAll()
	}
	if due(&s.cutAt, now) {
		s.cut()
	}
	for len(s.waiting) > 0 && s.running < s.Concurrency {
		first := s.waiting[0]
		s.waiting = s.waiting[1:]
		s.start(first)
	}
	if s.isStopping && s.giveUpAt.IsZero() && (s.running == 0 || s.isCut) {
		s.giveUpAt = now.Add(answersWithin)
	}
	s.speak()
	if due(&s.giveUpAt, now) {
		s.Logger.Warn("dataqueue: stopped without all answers; what was not answered may be delivered again", "tasks", len(s.held))
		return true
	}
	return s.isFinished()
}

func due(at *time.Time, now time.Time) bool {
	if at.IsZero() || at.After(now) {
		return false
	}
	*at = time.Time{}
	return true
}

// isFinished says farewell when all is done that was to be done before the end, and then waits for the server's.
func (s *session) isFinished() bool {
	if !s.isStopping || len(s.held) > 0 || len(s.unsaid) > 0 || s.running > 0 && !s.isCut {
		return false
	}
	if s.old != nil && len(s.old.sent) > 0 {
		return false
	}
	if s.current == nil {
		// One that is being opened may bring tasks yet: they go back at once, and not when the server misses the worker.
		return s.next == nil
	}
	if s.current.isFenced && len(s.current.sent) == 0 && !s.current.isClosed {
		s.current.isClosed = true
		close(s.current.requests)
	}
	return false
}

func (s *session) stop() {
	s.isStopping = true
	s.cancelAt = time.Now().Add(s.Grace)
	waiting := s.waiting
	s.waiting = nil
	for _, hold := range waiting {
		s.settle(hold, PutBack, "")
	}
}

func (s *session) cancelAll() {
	for _, hold := range s.held {
		if hold.state == runs {
			hold.cancel(ErrStopped)
		}
	}
}

// cut puts back what handlers that do not end still hold.
func (s *session) cut() {
	s.isCut = true
	for _, hold := range s.held {
		if hold.state == runs {
			s.Logger.Warn("dataqueue: a handler did not end when it was cancelled; its task is put back", "task", hold.task.ID)
			s.settle(hold, PutBack, "")
		}
	}
}

// abandon is the end with an error: handlers are cancelled, and have the grace to end.
func (s *session) abandon() {
	s.cancelAll()
	grace := time.After(s.Grace)
	for s.running > 0 {
		select {
		case <-s.finished:
			s.running--
		case <-grace:
			return
		}
	}
}

// What the handlers do.

func (s *session) start(hold *hold) {
	hold.state = runs
	s.running++
	ctx, cancel := context.WithCancelCause(s.base)
	hold.cancel = cancel
	go func() {
		verdict, reason := Failed, "the handler ended its goroutine"
		defer func() {
			cancel(nil)
			select {
			case s.finished <- finish{hold, verdict, reason}:
			case <-s.done:
			}
		}()
		verdict, reason = s.handle(ctx, hold.task)
	}()
}

// handle judges what the handler did. Only what it finished is acked.
func (s *session) handle(ctx context.Context, task *Task) (Verdict, string) {
	if s.Deadline > 0 {
		limited, cancel := context.WithTimeoutCause(ctx, s.Deadline, ErrDeadline)
		defer cancel()
		ctx = limited
	}
	err := s.call(ctx, task)
	cause := context.Cause(ctx)
	var rejected *rejection
	switch {
	case errors.Is(cause, ErrDeadline):
		return Failed, fmt.Sprintf("deadline of %g s passed", s.Deadline.Seconds())
	case err == nil:
		return Acked, ""
	case errors.As(err, &rejected):
		return Rejected, reasonOf(err)
	case cause != nil:
		return PutBack, ""
	default:
		return Failed, reasonOf(err)
	}
}

// call makes an error of a panic.
func (s *session) call(ctx context.Context, task *Task) (err error) {
	defer func() {
		if panicked := recover(); panicked != nil {
			s.Logger.Error("dataqueue: the handler panicked", "task", task.ID, "panic", panicked, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v", panicked)
		}
	}()
	return s.Handler(ctx, task)
}

// reasonOf is an error's text as the server takes it.
func reasonOf(err error) string {
	// An Error method may panic, on a nil pointer for one: fmt bears that.
	text := strings.ToValidUTF8(fmt.Sprint(err), "\uFFFD")
	if len(text) <= maxReason {
		return text
	}
	end := maxReason
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end]
}

// settle notes what is wanted for a task. Only the first time counts.
func (s *session) settle(hold *hold, verdict Verdict, reason string) {
	if hold.state == settles {
		return
	}
	hold.state = settles
	s.unsaid = append(s.unsaid, ask{wish{hold.task.Queue, verdict, reason}, hold.task.LeaseToken, hold})
}

// What the streams tell.

func (s *session) take(event event) error {
	from := event.stream
	if from.isGone {
		return nil
	}
	switch event.kind {
	case opened:
		s.opened(from)
	case cleared:
		from.isClear = true
	case heard:
		return s.hear(from, event.said)
	case ended:
		if s.isStopping && from.isClosed {
			s.lose(from)
			return nil
		}
		return s.broken(from, failure(event.err))
	}
	return nil
}

func (s *session) dial() {
	if s.next != nil {
		return
	}
	open := &dataqueuev1.ConsumeOpen{Queues: s.open.Queues, Lease: s.open.Lease, Session: s.open.Session}
	open.MaxOutstanding = max(s.wanted(), 1)
	s.next = &stream{
		since: time.Now(), told: open.MaxOutstanding, requests: make(chan *dataqueuev1.ConsumeRequest, 1),
		events: s.events, done: s.done,
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.next.cancel = cancel
	request := &dataqueuev1.ConsumeRequest{Request: &dataqueuev1.ConsumeRequest_Open{Open: open}}
	go s.next.run(ctx, s.Address, s.DialOptions, request)
}

// opened puts a stream into the place of the one before, which still has to answer what was said on it.
func (s *session) opened(from *stream) {
	s.lose(s.old)
	s.old, s.current, s.next = s.current, from, nil
	if s.old != nil {
		s.farewellAt = time.Now().Add(farewell)
	}
	// Its first message tells what it took over, and must come soon.
	from.isAsked = len(s.held) > 0
}

// broken opens another stream, or answers the error if that would not help.
func (s *session) broken(from *stream, failed *Error) error {
	// One that is replaced is taken over by its successor, which may be known a moment later.
	isTakenOver := failed.Reason == "SESSION_TAKEN_OVER"
	isReplaced := from.isDraining && isTakenOver
	isOld := from == s.old
	s.lose(from)
	if isOld {
		return nil
	}
	// The session is this worker's alone: it was a stream of its own that was thought dead and came late. Once.
	helps := isReplaced || isTakenOver && !s.wasTakenOver
	s.wasTakenOver = s.wasTakenOver || isTakenOver
	if !helps && !failed.passes() && failed.Code != codes.Internal {
		return failed
	}
	if s.current == nil && s.next == nil {
		pause := s.pauses.next() + failed.RetryAfter
		s.openAt = time.Now().Add(pause)
		s.Logger.Warn("dataqueue: no stream of tasks; another one is tried", "after", pause, "error", failed)
	} else if s.next == nil {
		// The one that drains is still there.
		s.openAt = time.Now().Add(s.pauses.next() + failed.RetryAfter)
	}
	return nil
}

// lose ends a stream. What it did not answer is said again on another one.
func (s *session) lose(from *stream) {
	if from == nil {
		return
	}
	for _, request := range from.sent {
		for _, ask := range request {
			if ask.verdict != fence {
				s.unsaid = append(s.unsaid, ask)
			}
		}
	}
	from.sent = nil
	s.hangUp(from)
	switch from {
	case s.current:
		s.current = nil
	case s.next:
		s.next = nil
	case s.old:
		s.old, s.farewellAt = nil, time.Time{}
	}
}

func (s *session) hangUp(streams ...*stream) {
	for _, stream := range streams {
		if stream != nil {
			stream.isGone = true
			stream.cancel()
		}
	}
}

func (s *session) hear(from *stream, said *dataqueuev1.ConsumeResponse) error {
	if !from.isHeard {
		from.isHeard = true
		s.resume(from, said.Resumed)
	}
	if len(said.Tasks) > 0 || len(said.Answers) > 0 {
		s.pauses.reset()
		s.wasTakenOver = false
	}
	for _, answer := range said.Answers {
		if err := s.answered(from, answer); err != nil {
			return s.broken(from, err)
		}
	}
	for _, task := range said.Tasks {
		s.deliver(from, task)
	}
	for _, cancelled := range said.Cancel {
		for _, token := range cancelled.LeaseTokens {
			s.revoke(s.held[token], ErrDeleted)
		}
	}
	if said.Drain && from == s.current && !from.isDraining && s.next == nil {
		from.isDraining = true
		s.openAt = time.Now()
		if s.openAt.Sub(from.since) < young {
			s.openAt = s.openAt.Add(s.pauses.next())
		}
	}
	return nil
}

// resume compares what a stream took over with what is held. What is not known here was lost on its way, and goes back. What is
// known and was not taken over is lost; yet what a handler makes of it is said, as only the server knows for certain.
func (s *session) resume(from *stream, resumed []*dataqueuev1.ResumedQueue) {
	for _, queue := range resumed {
		for _, token := range queue.LeaseTokens {
			if hold := s.held[token]; hold != nil {
				hold.stream = from
			} else {
				s.unsaid = append(s.unsaid, ask{wish{queue: queue.Queue, verdict: PutBack}, token, nil})
			}
		}
	}
	for _, hold := range s.held {
		if hold.stream != from && hold.state != settles {
			s.Logger.Warn("dataqueue: a lease was not taken over by the new stream", "task", hold.task.ID)
			s.revoke(hold, ErrLeaseLost)
		}
	}
}

// revoke cancels the handler of a task, or spares it the task.
func (s *session) revoke(revoked *hold, cause error) {
	switch {
	case revoked == nil:
	case revoked.state == runs:
		revoked.cancel(cause)
	case revoked.state == waits:
		s.waiting = slices.DeleteFunc(s.waiting, func(other *hold) bool { return other == revoked })
		s.settle(revoked, PutBack, "")
	}
}

func (s *session) deliver(from *stream, sent *dataqueuev1.Task) {
	if known := s.held[sent.LeaseToken]; known != nil {
		// It is handed out once, whatever comes.
		known.stream = from
		return
	}
	task, damage := receive(sent)
	hold := &hold{task: task, stream: from}
	s.held[task.LeaseToken] = hold
	switch {
	case s.isStopping:
		s.settle(hold, PutBack, "")
	case damage != "":
		s.Logger.Error("dataqueue: a task is damaged", "task", task.ID, "damage", damage)
		s.settle(hold, Failed, damage)
	default:
		s.waiting = append(s.waiting, hold)
		// More than that wait only if the server takes some that run for lost; the oldest may be lost too.
		if len(s.waiting) > s.Concurrency+max(s.Concurrency-s.running, 0) {
			oldest := s.waiting[0]
			s.waiting = s.waiting[1:]
			s.settle(oldest, PutBack, "")
		}
	}
}

// answered takes the answer to the first request of the stream that has none.
func (s *session) answered(from *stream, answer *dataqueuev1.ConsumeAnswer) *Error {
	if len(from.sent) == 0 || len(from.sent[0]) != len(answer.Outcomes) {
		return &Error{Code: codes.Internal, Message: "the server answered what it was not asked"}
	}
	asks := from.sent[0]
	from.sent = from.sent[1:]
	for i, outcome := range answer.Outcomes {
		if asks[i].hold != nil {
			s.settled(asks[i], outcome)
		}
	}
	return nil
}

func (s *session) settled(ask ask, outcome dataqueuev1.Outcome) {
	delete(s.held, ask.token)
	isLost := outcome != dataqueuev1.Outcome_OUTCOME_APPLIED && outcome != dataqueuev1.Outcome_OUTCOME_ALREADY_ACKED
	if isLost && ask.verdict == Acked {
		s.Logger.Warn("dataqueue: an ack came too late, as the lease was lost; the task is delivered again", "task", ask.hold.task.ID)
	}
	if s.Settled != nil {
		s.Settled(Settlement{ask.hold.task, ask.verdict, ask.reason, isLost})
	}
}

// What is said.

func (s *session) wanted() uint32 {
	if s.isStopping {
		return 0
	}
	return uint32(s.Concurrency)
}

// speak gives the stream what waits if it has room: what waits together goes together.
func (s *session) speak() {
	to := s.current
	if to == nil || !to.isClear || to.isClosed {
		return
	}
	if request := s.request(to); request != nil {
		to.isClear = false
		to.requests <- request
	}
}

func (s *session) request(to *stream) *dataqueuev1.ConsumeRequest {
	if wanted := s.wanted(); to.told != wanted {
		to.told = wanted
		return &dataqueuev1.ConsumeRequest{Request: &dataqueuev1.ConsumeRequest_MaxOutstanding{MaxOutstanding: wanted}}
	}
	if s.isStopping && len(s.unsaid) == 0 && !to.isFenced {
		// Its answer tells that no more tasks are on their way.
		to.isFenced, to.isAsked = true, true
	}
	var asks, rest []ask
	switch {
	case to.isAsked:
		to.isAsked = false
		asks, rest = []ask{{wish{queue: s.Queues[0].Name, verdict: fence}, nobody, nil}}, s.unsaid
	case len(s.unsaid) == 0:
		return nil
	default:
		for _, ask := range s.unsaid {
			if ask.wish == s.unsaid[0].wish && len(asks) < maxTokens {
				asks = append(asks, ask)
			} else {
				rest = append(rest, ask)
			}
		}
	}
	s.unsaid = rest
	to.sent = append(to.sent, asks)
	return asks[0].message(asks)
}
