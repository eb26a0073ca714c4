package dataqueue

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	dataqueuev1 "dataqueue/v1"
)

func TestAnInsertIsTriedOverARestartAndDoneOnce(t *testing.T) {
	s := startServer(t)
	producer := newProducer(t, s.address)
	stop, ended := make(chan struct{}), make(chan int)
	go func() {
		for count := 0; ; count++ {
			select {
			case <-stop:
				ended <- count
				return
			default:
			}
			if _, err := producer.Insert(context.Background(), "q", NewTask{JSON: strconv.Itoa(count)}); err != nil {
				t.Error(err)
			}
		}
	}()
	for range 3 {
		before := s.counts("q").Inserted
		eventually(t, "some are inserted", func() bool { return s.counts("q").Inserted >= before+20 })
		s.kill()
		s.start()
	}
	close(stop)
	if count := await(t, "the last insert", ended); s.counts("q").Inserted != uint64(count) {
		t.Errorf("%d inserts, %d tasks", count, s.counts("q").Inserted)
	}
}

func TestTheSameRequestInsertsOnce(t *testing.T) {
	s := startServer(t)
	producer := newProducer(t, s.address)
	first, err := producer.InsertAs(context.Background(), "one", "q", NewTask{Data: []byte{}, Headers: map[string]string{"a": "b"}})
	check(t, err)
	again, err := producer.InsertAs(context.Background(), "one", "q", NewTask{Data: []byte{}, Headers: map[string]string{"a": "b"}})
	check(t, err)
	if len(again) != 1 || first[0] != again[0] || s.counts("q").Inserted != 1 {
		t.Errorf("%v, then %v", first, again)
	}
}

func TestARefusalIsToldAtOnceWithReasonAndField(t *testing.T) {
	s := startServer(t)
	producer := newProducer(t, s.address)
	_, err := producer.Insert(context.Background(), "q", NewTask{JSON: "{}"}, NewTask{JSON: "{"})
	var refused *Error
	if !errors.As(err, &refused) || !strings.HasPrefix(err.Error(), "INVALID_ARGUMENT JSON_INVALID at tasks[1].json: ") {
		t.Errorf("the error is %v", err)
	}
	_, err = producer.Insert(context.Background(), "q", NewTask{JSON: "\"\xff\""})
	if !errors.As(err, &refused) || refused.Field != "tasks[0].json" {
		t.Errorf("the error is %v", err)
	}
	if _, err = NewProducer(ProducerConfig{Timeout: 5 * time.Minute}); !errors.As(err, &refused) {
		t.Errorf("the error is %v", err)
	}
}

func TestAFullQueueIsWaitedFor(t *testing.T) {
	s := startServer(t)
	limit := uint64(1)
	_, err := s.admin.UpdateQueue(context.Background(), &dataqueuev1.UpdateQueueRequest{
		Queue: "q", Settings: &dataqueuev1.QueueSettings{MaxTasks: &limit}, UpdateMask: mask("max_tasks"),
	})
	check(t, err)
	s.insert("q", 1)
	producer := newProducer(t, s.address)
	inserted := make(chan error, 1)
	go func() {
		_, err := producer.Insert(context.Background(), "q", NewTask{JSON: "2"})
		inserted <- err
	}()
	start(t, on(s, func(context.Context, *Task) error { return nil }))
	check(t, await(t, "the insert", inserted))
}

func TestAnInsertEndsWithItsContextOrTimeout(t *testing.T) {
	away := newServer(t)
	producer, err := NewProducer(ProducerConfig{Address: away.address, Timeout: 300 * time.Millisecond})
	check(t, err)
	var failed *Error
	_, err = producer.Insert(context.Background(), "q", NewTask{JSON: "1"})
	if !errors.As(err, &failed) || failed.Code != codes.DeadlineExceeded || !errors.Is(err, context.DeadlineExceeded) ||
		!strings.Contains(err.Error(), "UNAVAILABLE") {
		t.Errorf("the error is %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = producer.Insert(ctx, "q", NewTask{JSON: "1"})
	if !errors.As(err, &failed) || failed.Code != codes.Canceled || !errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
	check(t, producer.Close())
	if _, err = producer.Insert(context.Background(), "q", NewTask{JSON: "1"}); !errors.As(err, &failed) || failed.Code != codes.Canceled {
		t.Errorf("the error is %v", err)
	}
}

func TestABatcherInsertsTogetherAndTellsEachItsResult(t *testing.T) {
	s := startServer(t)
	batcher := newProducer(t, s.address).Batcher("q")
	const count = 2_500
	var receipts []*Receipt
	for n := range count {
		receipt, err := batcher.Add(context.Background(), NewTask{JSON: strconv.Itoa(n), UniqueKey: strconv.Itoa(n % (count - 1))})
		check(t, err)
		receipts = append(receipts, receipt)
	}
	check(t, batcher.Flush())
	ids := map[string]int{}
	duplicates, batches := 0, map[*batch]bool{}
	for _, receipt := range receipts {
		inserted, err := receipt.Result(context.Background())
		check(t, err)
		ids[inserted.ID]++
		batches[receipt.batch] = true
		if inserted.Duplicate {
			duplicates++
		}
	}
	if counts := s.counts("q"); len(ids) != count-1 || duplicates != 1 || counts.Inserted != count-1 || len(batches) > count/2 {
		t.Errorf("%d ids, %d duplicates, %d calls, %v", len(ids), duplicates, len(batches), counts)
	}
	refused, err := batcher.Add(context.Background(), NewTask{JSON: "{"})
	check(t, err)
	var told *Error
	if err := batcher.Close(); !errors.As(err, &told) || told.Reason != "JSON_INVALID" {
		t.Errorf("the error is %v", err)
	}
	if _, err := refused.Result(context.Background()); !errors.As(err, &told) || told.Reason != "JSON_INVALID" {
		t.Errorf("the error is %v", err)
	}
	if _, err := batcher.Add(context.Background(), NewTask{JSON: "1"}); !errors.Is(err, ErrClosed) {
		t.Errorf("the error is %v", err)
	}
}

func TestABatchHasAMebibyteAtTheMost(t *testing.T) {
	s := startServer(t)
	batcher := newProducer(t, s.address).Batcher("q")
	for range 10 {
		_, err := batcher.Add(context.Background(), NewTask{Data: make([]byte, 900_000)})
		check(t, err)
	}
	check(t, batcher.Close())
	if counts := s.counts("q"); counts.Inserted != 10 {
		t.Errorf("counts: %v", counts)
	}
}
