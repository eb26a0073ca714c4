package dataqueue

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	dataqueuev1 "dataqueue/v1"
)

const (
	defaultConcurrency = 16
	defaultGrace       = 30 * time.Second
	sessionBytes       = 16
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
