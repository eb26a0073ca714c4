package dataqueue

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	dataqueuev1 "dataqueue/v1"
)

// start runs a worker; the answer stops it and tells what Run answered.
func start(t *testing.T, worker *Worker) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- worker.Run(ctx) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return await(t, "the worker's end", ended)
	})
	t.Cleanup(func() { stop() })
	return stop
}

func on(s *server, handler Handler) *Worker {
	return &Worker{Address: s.address, Queues: []Queue{{Name: "q"}}, Handler: handler}
}

// retryAtOnce lets failed tasks come again without a pause.
func (s *server) retryAtOnce(queue string) {
	s.t.Helper()
	_, err := s.admin.UpdateQueue(context.Background(), &dataqueuev1.UpdateQueueRequest{
		Queue:      queue,
		Settings:   &dataqueuev1.QueueSettings{RetryBackoff: &dataqueuev1.RetryBackoff{Min: durationpb.New(0), Max: durationpb.New(0)}},
		UpdateMask: mask("retry_backoff"),
	})
	check(s.t, err)
}

func mask(field string) *fieldmaskpb.FieldMask { return &fieldmaskpb.FieldMask{Paths: []string{field}} }

// lastError is that of the only task in a state.
func (s *server) lastError(queue string, state dataqueuev1.TaskState) (text string) {
	s.t.Helper()
	eventually(s.t, "one task is "+state.String(), func() bool {
		listed, err := s.admin.ListTasks(context.Background(), &dataqueuev1.ListTasksRequest{Queue: queue, State: state})
		if err != nil || len(listed.Tasks) != 1 {
			return false
		}
		text = listed.Tasks[0].LastError
		return true
	})
	return text
}

func TestWhatReturnsIsAckedWhatFailsComesAgainAndWhatIsRejectedIsDead(t *testing.T) {
	s := startServer(t)
	s.retryAtOnce("q")
	s.insert("q", 40)
	var running, most, second atomic.Int32
	full := make(chan struct{})
	worker := on(s, func(_ context.Context, task *Task) error {
		if now := running.Add(1); now > most.Load() {
			most.Store(now)
			if now == 4 {
				close(full)
			}
		}
		defer running.Add(-1)
		<-full
		switch n := number(task); {
		case n == 7:
			return fmt.Errorf("seven: %w", Reject(errors.New("not wanted")))
		case n == 3 && task.Failures == 0:
			return errors.New("once more")
		case n == 5 && task.Failures == 0:
			panic("five")
		case n == 9 && task.Failures == 0:
			runtime.Goexit()
		case task.Failures == 1 && task.Deliveries == 2:
			second.Add(1)
		}
		return nil
	})
	worker.Concurrency = 4
	verdicts := map[Verdict]int{}
	worker.Settled = func(settled Settlement) { verdicts[settled.Verdict]++ }
	stop := start(t, worker)
	eventually(t, "all is done", func() bool { return s.counts("q").Acked == 39 })
	check(t, stop())
	if verdicts[Acked] != 39 || verdicts[Failed] != 3 || verdicts[Rejected] != 1 || second.Load() != 3 || most.Load() != 4 {
		t.Errorf("verdicts %v, second deliveries %d, at once %d", verdicts, second.Load(), most.Load())
	}
	if text := s.lastError("q", dataqueuev1.TaskState_TASK_STATE_DEAD); text != "seven: not wanted" {
		t.Errorf("the reason is %q", text)
	}
}

func TestAReasonIsCutBetweenCharactersAndIsAlwaysText(t *testing.T) {
	s := startServer(t)
	s.insert("q", 1)
	start(t, on(s, func(context.Context, *Task) error {
		return Reject(errors.New("\xff" + strings.Repeat("é", 2_000)))
	}))
	text := s.lastError("q", dataqueuev1.TaskState_TASK_STATE_DEAD)
	if want := "\uFFFD" + strings.Repeat("é", 510); text != want || !utf8.ValidString(text) {
		t.Errorf("%d bytes: %q", len(text), text)
	}
	if text := reasonOf((*Error)(nil)); text != "<nil>" {
		t.Errorf("an error that is a nil pointer: %q", text)
	}
	for _, length := range []int{1_023, 1_024, 1_025} {
		if got := reasonOf(errors.New(strings.Repeat("a", length))); len(got) != min(length, 1_024) {
			t.Errorf("%d bytes of %d", len(got), length)
		}
	}
}

func TestATaskPastItsDeadlineHasFailedEvenIfItsHandlerReturnsNil(t *testing.T) {
	s := startServer(t)
	s.insert("q", 1)
	worker := on(s, func(ctx context.Context, _ *Task) error {
		if _, has := ctx.Deadline(); !has {
			t.Error("the context has no deadline")
		}
		<-ctx.Done()
		if !errors.Is(context.Cause(ctx), ErrDeadline) || !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			t.Errorf("the cause is %v", context.Cause(ctx))
		}
		return nil
	})
	worker.Deadline = 50 * time.Millisecond
	stop := start(t, worker)
	if text := s.lastError("q", dataqueuev1.TaskState_TASK_STATE_SCHEDULED); text != "deadline of 0.05 s passed" {
		t.Errorf("the reason is %q", text)
	}
	check(t, stop())
	if counts := s.counts("q"); counts.Acked != 0 {
		t.Errorf("counts: %v", counts)
	}
}

func TestADeletedTaskCancelsItsHandlerAndIsGone(t *testing.T) {
	s := startServer(t)
	inserted := s.insert("q", 1)
	begun, cause := make(chan struct{}), make(chan error, 1)
	worker := on(s, func(ctx context.Context, _ *Task) error {
		close(begun)
		<-ctx.Done()
		cause <- context.Cause(ctx)
		return ctx.Err()
	})
	worker.Lease = 300 * time.Millisecond
	start(t, worker)
	await(t, "the task", begun)
	_, err := s.admin.DeleteTasks(context.Background(), &dataqueuev1.DeleteTasksRequest{Queue: "q", Ids: []string{inserted[0].ID}})
	check(t, err)
	if cause := await(t, "the cancel", cause); !errors.Is(cause, ErrDeleted) {
		t.Errorf("the cause is %v", cause)
	}
	eventually(t, "it is deleted", func() bool { return s.counts("q").Deleted == 1 })
}

func TestAServerThatIsKilledLosesNothingAndNothingUnfinishedIsAcked(t *testing.T) {
	s := startServer(t)
	const count, hung = 300, 17
	s.insert("q", count)
	var done sync.Map
	var handled, acked atomic.Int32
	release := make(chan struct{})
	worker := on(s, func(ctx context.Context, task *Task) error {
		if number(task) == hung {
			select {
			case <-release:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		done.Store(task.LeaseToken, true)
		handled.Add(1)
		return nil
	})
	worker.Settled = func(settled Settlement) {
		if _, isDone := done.Load(settled.Task.LeaseToken); settled.Verdict == Acked && !settled.IsLost {
			acked.Add(1)
			if !isDone {
				t.Error("a task was acked that was not done")
			}
		}
	}
	stop := start(t, worker)
	for _, after := range []int32{50, 150} {
		eventually(t, "some are handled", func() bool { return handled.Load() >= after })
		s.kill()
		s.start()
	}
	eventually(t, "all others are acked", func() bool { return s.counts("q").Acked == count-1 })
	if counts := s.counts("q"); counts.Leased != 1 {
		t.Errorf("the one that is not done is not held: %v", counts)
	}
	close(release)
	eventually(t, "all are acked", func() bool { return s.counts("q").Acked == count })
	check(t, stop())
	if counts := s.counts("q"); acked.Load() != count || counts.Inserted != count || counts.Ready+counts.Leased+counts.Dead != 0 {
		t.Errorf("%d were confirmed; counts: %v", acked.Load(), counts)
	}
}

func TestWhatIsHeldOverARestartIsNotDeliveredTwice(t *testing.T) {
	s := startServer(t)
	s.insert("q", 2)
	var deliveries atomic.Int32
	begun, release := make(chan struct{}, 2), make(chan struct{})
	worker := on(s, func(ctx context.Context, _ *Task) error {
		deliveries.Add(1)
		begun <- struct{}{}
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	start(t, worker)
	await(t, "a task", begun)
	await(t, "another task", begun)
	s.kill()
	s.start()
	s.insert("q", 1)
	// It comes on the new stream, behind what that one took over.
	await(t, "a task of the new stream", begun)
	close(release)
	eventually(t, "all are acked", func() bool { return s.counts("q").Acked == 3 })
	if deliveries.Load() != 3 {
		t.Errorf("%d deliveries of 3 tasks", deliveries.Load())
	}
}

func TestAnAckAfterTheLeaseWasTakenBackIsTold(t *testing.T) {
	s := startServer(t)
	s.insert("q", 1)
	var deliveries atomic.Int32
	begun, release, outcomes := make(chan struct{}), make(chan struct{}), make(chan bool, 2)
	worker := on(s, func(context.Context, *Task) error {
		if deliveries.Add(1) == 1 {
			close(begun)
			<-release
		}
		return nil
	})
	worker.Settled = func(settled Settlement) { outcomes <- settled.IsLost }
	start(t, worker)
	await(t, "the task", begun)
	_, err := s.calls.Putback(context.Background(), &dataqueuev1.PutbackRequest{
		Queue: "q", Selection: &dataqueuev1.PutbackRequest_HeldFor{HeldFor: durationpb.New(0)},
	})
	check(t, err)
	if await(t, "the ack of its second delivery", outcomes) {
		t.Error("the second delivery is lost")
	}
	close(release)
	if !await(t, "the ack of its first delivery", outcomes) {
		t.Error("the ack of the first delivery is confirmed")
	}
}

func TestAWorkerMayBeStartedBeforeItsServer(t *testing.T) {
	s := newServer(t)
	start(t, on(s, func(context.Context, *Task) error { return nil }))
	s.start()
	s.insert("q", 1)
	eventually(t, "it is acked", func() bool { return s.counts("q").Acked == 1 })
}

func TestAWorkerThatNeverSawAServerStops(t *testing.T) {
	check(t, start(t, on(newServer(t), func(context.Context, *Task) error { return nil }))())
}

func TestAStreamThatDrainsIsReplacedWhileHandlersRun(t *testing.T) {
	s := startServer(t, "--max-stream-age", "1s")
	s.insert("q", 1)
	begun, release := make(chan struct{}), make(chan struct{})
	var isLater, cancelled atomic.Bool
	worker := on(s, func(ctx context.Context, _ *Task) error {
		if isLater.Swap(true) {
			return nil
		}
		close(begun)
		select {
		case <-release:
		case <-ctx.Done():
			cancelled.Store(true)
		}
		return nil
	})
	worker.Lease = time.Second
	stop := start(t, worker)
	await(t, "the task", begun)
	// Streams live for about a second: what is inserted for three of them comes, and the held task stays.
	var count uint64 = 1
	for limit := time.Now().Add(3 * time.Second); time.Now().Before(limit); count++ {
		s.insert("q", 1)
		eventually(t, "it is acked", func() bool { return s.counts("q").Acked == count })
	}
	close(release)
	eventually(t, "the held one too", func() bool { return s.counts("q").Acked == count })
	check(t, stop())
	if cancelled.Load() {
		t.Error("the handler was cancelled")
	}
}

func TestStopFinishesWhatEndsWithinTheGraceAndGivesBackTheRest(t *testing.T) {
	s := startServer(t)
	s.insert("q", 10)
	begun, release := make(chan int, 4), make(chan struct{})
	stuck := make(chan struct{})
	worker := on(s, func(ctx context.Context, task *Task) error {
		n := number(task)
		begun <- n
		switch n {
		case 0:
			<-release
			return nil
		case 1:
			<-stuck
			return nil
		}
		<-ctx.Done()
		if !errors.Is(context.Cause(ctx), ErrStopped) {
			t.Errorf("the cause is %v", context.Cause(ctx))
		}
		return ctx.Err()
	})
	worker.Concurrency, worker.Grace = 4, time.Second
	stop := start(t, worker)
	for range 4 {
		await(t, "a task", begun)
	}
	ended := make(chan error, 1)
	go func() { ended <- stop() }()
	close(release)
	check(t, await(t, "the end", ended))
	close(stuck)
	counts := s.counts("q")
	if counts.Acked != 1 || counts.Ready != 9 || counts.Leased+counts.Scheduled+counts.Dead != 0 {
		t.Errorf("counts: %v", counts)
	}
	request := &dataqueuev1.ListTasksRequest{Queue: "q", State: dataqueuev1.TaskState_TASK_STATE_READY}
	listed, err := s.admin.ListTasks(context.Background(), request)
	check(t, err)
	for _, info := range listed.Tasks {
		if info.Task.Failures+info.Task.Expiries != 0 {
			t.Errorf("giving back counts: %v", info)
		}
	}
}

func TestARefusalEndsTheWorkerWithReasonAndField(t *testing.T) {
	s := startServer(t)
	worker := on(s, func(context.Context, *Task) error { return nil })
	worker.Lease = time.Millisecond
	var refused *Error
	if err := worker.Run(context.Background()); !errors.As(err, &refused) {
		t.Fatalf("it ended with %v", err)
	}
	if refused.Code != codes.InvalidArgument || refused.Reason != "LEASE_OUT_OF_RANGE" || refused.Field == "" ||
		!strings.HasPrefix(refused.Error(), "INVALID_ARGUMENT LEASE_OUT_OF_RANGE at "+refused.Field+": ") {
		t.Errorf("it ended with %v", refused)
	}
	worker.Lease, worker.Queues = 0, []Queue{{Name: "q"}, {Name: "no name"}}
	if err := worker.Run(context.Background()); !errors.As(err, &refused) || refused.Reason != "QUEUE_NAME_INVALID" {
		t.Errorf("it ended with %v", err)
	}
}

func TestADamagedTaskIsNotHandled(t *testing.T) {
	sent := &dataqueuev1.Task{Id: "i", Value: &dataqueuev1.Task_Data{Data: []byte("ab")}, Md5: "187ef4436122d1cc2f40dc2b92f0eba0"}
	if _, damage := receive(sent); damage != "" {
		t.Error(damage)
	}
	sent.Value = &dataqueuev1.Task_Data{Data: []byte("ac")}
	if _, damage := receive(sent); !strings.Contains(damage, "187ef4436122d1cc2f40dc2b92f0eba0") {
		t.Errorf("damage: %q", damage)
	}
}
