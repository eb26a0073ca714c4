package dataqueue

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/protobuf/proto"

	dataqueuev1 "dataqueue/v1"
)

const (
	defaultTimeout = 30 * time.Second
	// A server remembers request ids for so long.
	memoryWindow = 5 * time.Minute
	// One try: what is not answered by then is asked again.
	tryTimeout = 10 * time.Second

	batchTasks    = 1_000
	batchBytes    = 1 << 20
	batchLinger   = 5 * time.Millisecond
	batchesFlying = 4
)

// ProducerConfig says how a producer is set up. The zero value is a good one.
type ProducerConfig struct {
	// Address is as for [Dial].
	Address string
	// Timeout is for how long an insert is tried: less than 5 min, as the server remembers request ids for so long. Default: 30 s.
	// The context of a call may end it earlier.
	Timeout     time.Duration
	DialOptions []grpc.DialOption
}

// A Producer inserts tasks: each once, however often it has to be tried. It is safe for concurrent use.
type Producer struct {
	conn    *grpc.ClientConn
	client  dataqueuev1.DataQueueClient
	timeout time.Duration
}

// An Inserted tells what became of a new task.
type Inserted struct {
	// ID is the task's; of a duplicate, that of the task that has its unique key.
	ID string
	// Duplicate tells that another task has the unique key: this one was not inserted.
	Duplicate bool
}

// NewProducer makes a producer. It connects when it is used.
func NewProducer(config ProducerConfig) (*Producer, error) {
	timeout := cmp.Or(config.Timeout, defaultTimeout)
	if timeout < 0 || timeout >= memoryWindow {
		return nil, invalid("timeout", "it is %v; more than 0 and less than %v is allowed", timeout, memoryWindow)
	}
	conn, err := Dial(config.Address, config.DialOptions...)
	if err != nil {
		return nil, err
	}
	return &Producer{conn, dataqueuev1.NewDataQueueClient(conn), timeout}, nil
}

// Close closes the producer's connection. Its batchers are to be closed before.
func (p *Producer) Close() error { return p.conn.Close() }

// Insert inserts tasks, all of them or none, and answers one result for each, in order. It goes on trying while the server is
// away or full, until the producer's timeout or the context's end: after that the tasks may be inserted nevertheless.
func (p *Producer) Insert(ctx context.Context, queue string, tasks ...NewTask) ([]Inserted, error) {
	return p.InsertAs(ctx, rand.Text(), queue, tasks...)
}

// InsertAs is Insert with a request id of the caller's: the same call, made again within 5 minutes, inserts nothing and answers
// what the first one did.
func (p *Producer) InsertAs(ctx context.Context, requestID, queue string, tasks ...NewTask) ([]Inserted, error) {
	if requestID == "" {
		return nil, invalid("request_id", "it is empty; without one the call cannot be repeated")
	}
	messages := make([]*dataqueuev1.NewTask, len(tasks))
	for i := range tasks {
		message, err := tasks[i].message(fmt.Sprintf("tasks[%d]", i))
		if err != nil {
			return nil, err
		}
		messages[i] = message
	}
	return p.insert(ctx, &dataqueuev1.InsertRequest{Queue: queue, Tasks: messages, RequestId: requestID})
}

func (p *Producer) insert(ctx context.Context, request *dataqueuev1.InsertRequest) ([]Inserted, error) {
	if !utf8.ValidString(request.Queue) || !utf8.ValidString(request.RequestId) {
		return nil, invalid("", "the queue's name or the request id is not UTF-8")
	}
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	var pauses pauses
	for {
		response, err := p.try(ctx, request)
		if err == nil {
			return results(request, response)
		}
		failed := failure(err)
		isClosed := p.conn.GetState() == connectivity.Shutdown
		if ctx.Err() == nil && (isClosed || !failed.passes()) {
			return nil, failed
		}
		if ctx.Err() != nil || !sleep(ctx, pauses.next()+failed.RetryAfter) {
			return nil, unanswered(ctx, failed)
		}
	}
}

func (p *Producer) try(ctx context.Context, request *dataqueuev1.InsertRequest) (*dataqueuev1.InsertResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	return p.client.Insert(ctx, request)
}

func results(request *dataqueuev1.InsertRequest, response *dataqueuev1.InsertResponse) ([]Inserted, error) {
	if len(response.Results) != len(request.Tasks) {
		return nil, &Error{Code: codes.Internal, Message: "the server did not answer one result for each task"}
	}
	inserted := make([]Inserted, len(response.Results))
	for i, result := range response.Results {
		inserted[i] = Inserted{result.Id, result.Duplicate}
	}
	return inserted, nil
}

func unanswered(ctx context.Context, last *Error) *Error {
	code := codes.DeadlineExceeded
	if errors.Is(ctx.Err(), context.Canceled) {
		code = codes.Canceled
	}
	message := fmt.Sprintf("the insert was not answered in time, and may have been done; the last try: %v", last)
	return &Error{Code: code, Message: message, cause: errors.Join(ctx.Err(), last)}
}

// Batcher makes a batcher for a queue. It must be closed.
func (p *Producer) Batcher(queue string) *Batcher {
	b := &Batcher{
		producer: p, queue: queue,
		adds: make(chan addition), flushes: make(chan chan error), closed: make(chan struct{}), ended: make(chan struct{}),
		flying: make(chan struct{}, batchesFlying),
	}
	go b.run()
	return b
}

// A Batcher inserts tasks that are added one by one together: up to 1,000 tasks or 1 MiB in a call, which waits at most 5 ms to be
// filled. At most 4 calls are under way; tasks of different ones may be inserted in another order. It is safe for concurrent use.
type Batcher struct {
	producer *Producer
	queue    string
	adds     chan addition
	flushes  chan chan error
	close    sync.Once
	closed   chan struct{}
	ended    chan struct{}
	flying   chan struct{}
	mutex    sync.Mutex
	err      error
}

type addition struct {
	task   *dataqueuev1.NewTask
	size   int
	answer chan<- *Receipt
}

// batch is one call. Its results are there when it is done.
type batch struct {
	tasks   []*dataqueuev1.NewTask
	bytes   int
	done    chan struct{}
	results []Inserted
	err     error
}

// A Receipt is for a task that was added.
type Receipt struct {
	batch *batch
	index int
}

// Result waits for what became of the task. Who refuses one task refuses all of its call: the error is that of the call.
func (r *Receipt) Result(ctx context.Context) (Inserted, error) {
	select {
	case <-r.batch.done:
	case <-ctx.Done():
		return Inserted{}, context.Cause(ctx)
	}
	if r.batch.err != nil {
		return Inserted{}, r.batch.err
	}
	return r.batch.results[r.index], nil
}

// ErrClosed is for what is added to a batcher that was closed.
var ErrClosed = errors.New("dataqueue: the batcher is closed; nothing was sent")

// Add adds a task. It waits while as many calls are under way as may be.
func (b *Batcher) Add(ctx context.Context, task NewTask) (*Receipt, error) {
	message, err := task.message("task")
	if err != nil {
		return nil, err
	}
	answer := make(chan *Receipt, 1)
	select {
	case b.adds <- addition{message, proto.Size(message), answer}:
		return <-answer, nil
	case <-b.closed:
		return nil, ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Flush sends what was added so far, waits until all of it is answered, and tells the first error since the last flush.
func (b *Batcher) Flush() error {
	answer := make(chan error, 1)
	select {
	case b.flushes <- answer:
		return <-answer
	case <-b.ended:
		return b.takeError()
	}
}

// Close is Flush, and the end of the batcher.
func (b *Batcher) Close() error {
	b.close.Do(func() { close(b.closed) })
	<-b.ended
	return b.takeError()
}

func (b *Batcher) run() {
	defer close(b.ended)
	linger := time.NewTimer(batchLinger)
	linger.Stop()
	var open *batch
	send := func() {
		linger.Stop()
		if open != nil {
			b.send(open)
			open = nil
		}
	}
	for {
		select {
		case add := <-b.adds:
			if open != nil && open.bytes+add.size > batchBytes {
				send()
			}
			if open == nil {
				open = &batch{done: make(chan struct{})}
				linger.Reset(batchLinger)
			}
			add.answer <- &Receipt{open, len(open.tasks)}
			open.tasks, open.bytes = append(open.tasks, add.task), open.bytes+add.size
			if len(open.tasks) == batchTasks {
				send()
			}
		case <-linger.C:
			send()
		case answer := <-b.flushes:
			send()
			b.land()
			answer <- b.takeError()
		case <-b.closed:
			send()
			b.land()
			return
		}
	}
}

// send waits for its place among the calls under way.
func (b *Batcher) send(open *batch) {
	b.flying <- struct{}{}
	go func() {
		request := &dataqueuev1.InsertRequest{Queue: b.queue, Tasks: open.tasks, RequestId: rand.Text()}
		open.results, open.err = b.producer.insert(context.Background(), request)
		b.note(open.err)
		close(open.done)
		<-b.flying
	}()
}

// land waits until no call is under way.
func (b *Batcher) land() {
	for range batchesFlying {
		b.flying <- struct{}{}
	}
	for range batchesFlying {
		<-b.flying
	}
}

func (b *Batcher) note(err error) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	b.err = cmp.Or(b.err, err)
}

func (b *Batcher) takeError() error {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	err := b.err
	b.err = nil
	return err
}
