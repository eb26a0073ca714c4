package dataqueue

import (
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	dataqueuev1 "dataqueue/v1"
)

// A Task is one delivery of a task.
type Task struct {
	// ID names the task for life.
	ID    string
	Queue string
	// LeaseToken names this delivery.
	LeaseToken string
	// Value is as it was inserted, byte for byte: JSON text, or any bytes.
	Value   []byte
	IsJSON  bool
	Headers map[string]string
	// Priority is 0 to 9.
	Priority uint32
	// Deliveries counts this one too. Failures and Expiries are those before it.
	Deliveries, Failures, Expiries uint32
	InsertedAt                     time.Time
}

// receive takes a task over, and tells why it is damaged if it is.
func receive(sent *dataqueuev1.Task) (task *Task, damage string) {
	task = &Task{
		ID: sent.Id, Queue: sent.Queue, LeaseToken: sent.LeaseToken, Headers: sent.Headers, Priority: sent.Priority,
		Deliveries: sent.Deliveries, Failures: sent.Failures, Expiries: sent.Expiries, InsertedAt: sent.InsertedAt.AsTime(),
	}
	switch value := sent.Value.(type) {
	case *dataqueuev1.Task_Json:
		task.Value, task.IsJSON = []byte(value.Json), true
	case *dataqueuev1.Task_Data:
		task.Value = value.Data
	}
	sum := md5.Sum(task.Value)
	if got := hex.EncodeToString(sum[:]); got != sent.Md5 {
		damage = fmt.Sprintf("the value arrived damaged: its MD5 is %s, and was %s when it was inserted", got, sent.Md5)
	}
	return task, damage
}

// A NewTask is a task to insert: JSON or Data, and what else is wanted.
type NewTask struct {
	// JSON is one JSON text, kept as it is.
	JSON string
	// Data is the value if JSON is empty; empty but not nil is a value.
	Data    []byte
	Headers map[string]string
	// Priority is 0 to 9: higher ones are delivered first.
	Priority uint32
	// Delay is how long after its insert the task can be delivered; DeliverAt says the same as a time. At most one of them.
	Delay     time.Duration
	DeliverAt time.Time
	// TTL is how long after its insert the task expires. 0: never.
	TTL time.Duration
	// UniqueKey keeps another task with the same key out while this one is in the queue.
	UniqueKey string
}

// message checks only what gRPC could not send; all else is the server's to say.
func (t *NewTask) message(field string) (*dataqueuev1.NewTask, error) {
	task := &dataqueuev1.NewTask{Headers: t.Headers, Priority: t.Priority, UniqueKey: t.UniqueKey}
	switch {
	case t.JSON != "":
		task.Value = &dataqueuev1.NewTask_Json{Json: t.JSON}
	case t.Data != nil:
		task.Value = &dataqueuev1.NewTask_Data{Data: t.Data}
	}
	if t.Delay != 0 {
		task.Delay = durationpb.New(t.Delay)
	}
	if !t.DeliverAt.IsZero() {
		task.DeliverAt = timestamppb.New(t.DeliverAt)
	}
	if t.TTL != 0 {
		task.Ttl = durationpb.New(t.TTL)
	}
	if !utf8.ValidString(t.JSON) {
		return nil, invalid(field+".json", "it is not UTF-8")
	}
	if !utf8.ValidString(t.UniqueKey) {
		return nil, invalid(field+".unique_key", "it is not UTF-8")
	}
	for key, value := range t.Headers {
		if !utf8.ValidString(key) || !utf8.ValidString(value) {
			return nil, invalid(field+".headers", "one is not UTF-8")
		}
	}
	return task, nil
}
