package dataqueue

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	dataqueuev1 "dataqueue/v1"
)

const (
	defaultConcurrency = 16
	defaultGrace       = 30 * time.Second
	sessionBytes       = 16
	maxReason          = 1_024
	maxTokens          = 1_000
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
	// Nobody's token: a heartbeat for it changes nothing, and its answer tells that all before it was heard.
	nobody = "00000000000000000000000000000000"
)

// Why a handler's context has ended, as [context.Cause] tells it.
var (
	// ErrDeadline is for a task that took longer than the worker's Deadline.
	ErrDeadline = errors.New("dataqueue: the task's deadline has passed")
	// ErrDeleted is for a task that an operator deleted.
	ErrDeleted = errors.New("dataqueue: the task was deleted")
	// ErrLeaseLost is for a task that is delivered again to somebody.
	ErrLeaseLost = errors.New("dataqueue: the lease is lost")
	// ErrStopped is for the end of the worker's grace, or of the worker.
	ErrStopped = errors.New("dataqueue: the worker stops")
)

// A Handler works on a task. Nil acks it; an error fails it, so that it is delivered again later, or with [Reject] never. Its
// context ends with the task's deadline, or when there is no use in going on.
type Handler func(ctx context.Context, task *Task) error

// A Queue is one that a worker takes tasks of.
type Queue struct {
	Name string
	// Weight is its share of the deliveries while all queues have tasks, 1 to 100. Default: 1.
	Weight uint32
}

// A Worker handles the tasks of queues. Its fields are set before Run, and not changed any more.
type Worker struct {
	Queues  []Queue
	Handler Handler
	// Address is as for [Dial].
	Address string
	// Concurrency is how many handlers run at once, and how many tasks are held: 1 to 10,000. Default: 16.
	Concurrency int
	// Lease is for how long a task is held without a sign of life. Default: the server's.
	Lease time.Duration
	// Deadline is how long a handler may take; beyond it the task has failed. Default: any time.
	Deadline time.Duration
	// Grace is how long handlers may go on when the worker stops. Default: 30 s. Negative: none.
	Grace time.Duration
	// Settled is told what the server answered about each task that was handled. It is called by the worker's own goroutine, one
	// call after the other, and must not block. Default: nothing.
	Settled func(Settlement)
	// Logger is told what goes wrong. Default: [slog.Default].
	Logger      *slog.Logger
	DialOptions []grpc.DialOption
}

// A Settlement is the end of a delivery.
type Settlement struct {
	Task *Task
	// Verdict is what the worker asked for.
	Verdict Verdict
	// Reason is why it failed or was rejected.
	Reason string
	// IsLost tells that it was too late, or that an earlier try, whose answer was lost, put it back: nothing was changed.
	IsLost bool
}

// Verdict is what becomes of a delivery.
type Verdict int

const (
	// Acked is done and gone.
	Acked Verdict = iota
	// Failed is delivered again later, unless it failed too often.
	Failed
	// Rejected is a dead letter.
	Rejected
	// PutBack is delivered again at once.
	PutBack
	// No task's: asks the server for an answer.
	fence
)

// Run handles tasks until the context ends, and then stops: no more tasks come, handlers finish within the grace, what does not is
// put back. It returns nil then, or the [Error] that no other try helps against. The server need not be there yet, and may go and
// come back. Values of the context are the handlers' too.
func (w *Worker) Run(ctx context.Context) error {
	s, err := w.session(ctx)
	if err != nil {
		return err
	}
	defer close(s.done)
	err = s.loop(ctx.Done())
	s.hangUp(s.current, s.next, s.old)
	if err != nil {
		s.abandon()
	}
	return err
}

func (w *Worker) session(ctx context.Context) (*session, error) {
	config := *w
	config.Concurrency = cmp.Or(config.Concurrency, defaultConcurrency)
	config.Grace = max(cmp.Or(config.Grace, defaultGrace), 0)
	config.Logger = cmp.Or(config.Logger, slog.Default())
	switch {
	case config.Handler == nil:
		return nil, invalid("Handler", "it is nil")
	case len(config.Queues) == 0:
		return nil, invalid("Queues", "there is none")
	case config.Concurrency < 0:
		return nil, invalid("Concurrency", "it is %d; 1 to 10,000 are allowed", config.Concurrency)
	}
	open := &dataqueuev1.ConsumeOpen{Session: make([]byte, sessionBytes)}
	rand.Read(open.Session)
	for _, queue := range config.Queues {
		if !utf8.ValidString(queue.Name) {
			return nil, invalid("Queues", "a name is not UTF-8")
		}
		open.Queues = append(open.Queues, &dataqueuev1.ConsumeQueue{Name: queue.Name, Weight: queue.Weight})
	}
	if config.Lease != 0 {
		open.Lease = durationpb.New(config.Lease)
	}
	return &session{
		Worker: config, open: open, base: context.WithoutCancel(ctx), held: map[string]*hold{}, openAt: time.Now(),
		events: make(chan event), finished: make(chan finish), done: make(chan struct{}),
	}, nil
}

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

// wish is what is wanted for a task of a queue. Tasks of equal wishes go together.
type wish struct {
	queue   string
	verdict Verdict
	reason  string
}

type ask struct {
	wish
	token string
	// Nil for what the worker does not know.
	hold *hold
}

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
		return true
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

// Handlers.

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
	text := strings.ToValidUTF8(err.Error(), "\uFFFD")
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

type event struct {
	stream *stream
	kind   eventKind
	said   *dataqueuev1.ConsumeResponse
	err    error
}

type eventKind int

const (
	opened eventKind = iota
	// It has room for another request.
	cleared
	heard
	ended
)

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
	if len(s.held) > 0 {
		// Its first message tells what it took over, and must come soon.
		s.unsaid = append(s.unsaid, s.fence())
	}
}

func (s *session) fence() ask {
	return ask{wish{queue: s.Queues[0].Name, verdict: fence}, nobody, nil}
}

// broken opens another stream, or answers the error if that would not help.
func (s *session) broken(from *stream, failed *Error) error {
	// One that is replaced is taken over by its successor, which may be known a moment later.
	isReplaced := from.isDraining && failed.Reason == "SESSION_TAKEN_OVER"
	isOld := from == s.old
	s.lose(from)
	if isOld {
		return nil
	}
	if !isReplaced && !failed.passes() && failed.Code != codes.Internal {
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
	isLost := outcome == dataqueuev1.Outcome_OUTCOME_LEASE_LOST
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
		to.isFenced = true
		s.unsaid = append(s.unsaid, s.fence())
	}
	if len(s.unsaid) == 0 {
		return nil
	}
	wish := s.unsaid[0].wish
	var asks, rest []ask
	for _, ask := range s.unsaid {
		if ask.wish == wish && len(asks) < maxTokens {
			asks = append(asks, ask)
		} else {
			rest = append(rest, ask)
		}
	}
	s.unsaid = rest
	to.sent = append(to.sent, asks)
	return wish.message(asks)
}

func (w wish) message(asks []ask) *dataqueuev1.ConsumeRequest {
	tokens := make([]string, len(asks))
	for i, ask := range asks {
		tokens[i] = ask.token
	}
	switch w.verdict {
	case Acked:
		ack := &dataqueuev1.ConsumeAck{Queue: w.queue, LeaseTokens: tokens}
		return &dataqueuev1.ConsumeRequest{Request: &dataqueuev1.ConsumeRequest_Ack{Ack: ack}}
	case fence:
		beat := &dataqueuev1.ConsumeHeartbeat{Queue: w.queue, LeaseTokens: tokens}
		return &dataqueuev1.ConsumeRequest{Request: &dataqueuev1.ConsumeRequest_Heartbeat{Heartbeat: beat}}
	default:
		putback := &dataqueuev1.ConsumePutback{
			Queue: w.queue, LeaseTokens: tokens, Reason: w.reason, Failed: w.verdict == Failed, DeadLetter: w.verdict == Rejected,
		}
		return &dataqueuev1.ConsumeRequest{Request: &dataqueuev1.ConsumeRequest_Putback{Putback: putback}}
	}
}

// stream is a stream of deliveries, on a connection of its own: on that of a server that stops no new stream would be served.
type stream struct {
	since    time.Time
	cancel   context.CancelFunc
	requests chan *dataqueuev1.ConsumeRequest
	events   chan<- event
	done     <-chan struct{}

	// What follows belongs to the session.

	// The max_outstanding that the server knows.
	told uint32
	// Requests that are not answered, in their order.
	sent [][]ask
	// isClear: it has room for a request. isHeard: its first message has come. isFenced: the server was asked for a sign that it has
	// heard that no more tasks are wanted. isDraining: the server is about to end it. isClosed: all was said. isGone: nothing that it
	// tells counts any more.
	isClear, isHeard, isFenced, isDraining, isClosed, isGone bool
}

func (s *stream) tell(kind eventKind, said *dataqueuev1.ConsumeResponse, err error) {
	select {
	case s.events <- event{s, kind, said, err}:
	case <-s.done:
	}
}

// run opens the stream and tells what comes.
func (s *stream) run(ctx context.Context, address string, options []grpc.DialOption, open *dataqueuev1.ConsumeRequest) {
	defer s.cancel()
	conn, err := Dial(address, options...)
	if err != nil {
		s.tell(ended, nil, err)
		return
	}
	defer conn.Close()
	calls, err := dataqueuev1.NewDataQueueClient(conn).Consume(ctx)
	if err != nil {
		s.tell(ended, nil, err)
		return
	}
	// What keeps it from being sent, receiving tells.
	_ = calls.Send(open)
	if header, _ := calls.Header(); header != nil {
		s.tell(opened, nil, nil)
		go s.send(ctx, calls)
	}
	for {
		said, err := calls.Recv()
		if errors.Is(err, io.EOF) {
			err = status.Error(codes.Unavailable, "the server ended the stream")
		}
		if err != nil {
			s.tell(ended, nil, err)
			return
		}
		s.tell(heard, said, nil)
	}
}

// send says one thing after the other.
func (s *stream) send(ctx context.Context, calls dataqueuev1.DataQueue_ConsumeClient) {
	for {
		s.tell(cleared, nil, nil)
		select {
		case request, isOpen := <-s.requests:
			if !isOpen {
				_ = calls.CloseSend()
				return
			}
			if err := calls.Send(request); err != nil {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}
