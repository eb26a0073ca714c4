package main

import (
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"dataqueue"
)

type work struct {
	queue       string
	concurrency int
	failEvery   int64
	hold, grace time.Duration
}

func (w *work) run(ctx context.Context, address string) error {
	grace := w.grace
	if grace == 0 {
		grace = -1
	}
	var deliveries atomic.Int64
	worker := &dataqueue.Worker{
		Address: address, Queues: []dataqueue.Queue{{Name: w.queue}}, Concurrency: w.concurrency, Grace: grace,
		Handler: func(ctx context.Context, task *dataqueue.Task) error {
			fmt.Printf("delivered %s %s %x\n", task.ID, task.LeaseToken, md5.Sum(task.Value))
			select {
			case <-time.After(w.hold):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if n := deliveries.Add(1); w.failEvery > 0 && n%w.failEvery == 0 {
				return errors.New("as asked")
			}
			return nil
		},
		Settled: func(settled dataqueue.Settlement) {
			task := settled.Task
			switch {
			case settled.Verdict != dataqueue.Acked:
			case settled.IsLost:
				fmt.Printf("lost %s %s\n", task.ID, task.LeaseToken)
			default:
				fmt.Printf("acked %s %s\n", task.ID, task.LeaseToken)
			}
		},
	}
	if err := worker.Run(ctx); err != nil {
		return err
	}
	fmt.Println("stopped")
	return nil
}
