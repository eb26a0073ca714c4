package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	"dataqueue"
	dataqueuev1 "dataqueue/v1"
)

const (
	countsWithin = 10 * time.Second
	stepWithin   = 3 * time.Minute
)

type step struct {
	Do           string
	Queue        string
	RequestID    string `json:"request_id"`
	Names        []string
	Tasks        json.RawMessage
	Stale        []string
	Lease        *int64
	Wait         *int64
	Delay        *int64
	MaxTasks     uint32 `json:"max_tasks"`
	Reason       string
	Failed       bool
	DeadLetter   bool `json:"dead_letter"`
	Count        int
	Concurrency  int
	Fail, Reject []int
	RestartAfter int `json:"restart_after"`
	Expect       map[string]json.RawMessage
}

type newTask struct {
	JSON    *string
	Data    []byte
	Headers map[string]string
}

// inserted is what the run knows of a task that has a name.
type inserted struct {
	id     string
	task   newTask
	tokens []string
}

type scenario struct {
	address  string
	calls    dataqueuev1.DataQueueClient
	admin    dataqueuev1.QueueAdminClient
	producer *dataqueue.Producer
	named    map[string]*inserted
}

func runScenario(ctx context.Context, address, file, prefix string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var script struct{ Steps []step }
	if err := json.Unmarshal(text, &script); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	conn, err := dataqueue.Dial(address)
	if err != nil {
		return err
	}
	defer conn.Close()
	producer, err := dataqueue.NewProducer(dataqueue.ProducerConfig{Address: address, Timeout: 2 * time.Minute})
	if err != nil {
		return err
	}
	defer producer.Close()
	s := &scenario{
		address, dataqueuev1.NewDataQueueClient(conn), dataqueuev1.NewQueueAdminClient(conn), producer, map[string]*inserted{},
	}
	for i, step := range script.Steps {
		name := step.Queue
		step.Queue = prefix + "-" + step.Queue
		if err := s.run(ctx, &step); err != nil {
			fmt.Printf("failed %d %s %s: %v\n", i+1, step.Do, name, err)
			return errors.New("a step failed")
		}
		fmt.Printf("ok %d %s %s\n", i+1, step.Do, name)
	}
	return nil
}

func (s *scenario) run(ctx context.Context, step *step) error {
	ctx, cancel := context.WithTimeout(ctx, stepWithin)
	defer cancel()
	var got map[string]any
	var err error
	switch step.Do {
	case "insert":
		got, err = s.insert(ctx, step)
	case "pop":
		got, err = s.pop(ctx, step)
	case "pop_batch":
		got, err = s.popBatch(ctx, step)
	case "heartbeat", "ack", "putback":
		got, err = s.settle(ctx, step)
	case "counts":
		return s.counts(ctx, step)
	case "dead":
		got, err = s.dead(ctx, step)
	case "consume":
		got, err = s.consume(ctx, step)
	case "reconnect":
		got, err = s.reconnect(ctx, step)
	default:
		err = errors.New("there is no such step")
	}
	if err != nil {
		if _, isExpected := step.Expect["error"]; !isExpected {
			return err
		}
		got = map[string]any{"error": refusal(err)}
	}
	return compare(step.Expect, got)
}

// compare looks at what is expected, and at nothing else.
func compare(expected map[string]json.RawMessage, got map[string]any) error {
	for field, want := range expected {
		text, err := json.Marshal(got[field])
		if err != nil {
			return err
		}
		if field == "error" {
			var wants map[string]json.RawMessage
			if err := json.Unmarshal(want, &wants); err != nil {
				return err
			}
			has, _ := got[field].(map[string]any)
			if err := compare(wants, has); err != nil {
				return fmt.Errorf("error: %w", err)
			}
			continue
		}
		var is, wanted any
		if err := errors.Join(json.Unmarshal(text, &is), json.Unmarshal(want, &wanted)); err != nil {
			return err
		}
		if !reflect.DeepEqual(is, wanted) {
			return fmt.Errorf("%s is %s, not %s", field, text, want)
		}
	}
	return nil
}

func refusal(err error) map[string]any {
	said := status.Convert(err)
	got := map[string]any{"code": code.Code(said.Code()).String()}
	for _, detail := range said.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			got["reason"] = detail.Reason
		case *errdetails.BadRequest:
			got["field"] = detail.FieldViolations[0].Field
		}
	}
	return got
}

func duration(milliseconds *int64) *durationpb.Duration {
	if milliseconds == nil {
		return nil
	}
	return durationpb.New(time.Duration(*milliseconds) * time.Millisecond)
}

// Single calls.

func (s *scenario) insert(ctx context.Context, step *step) (map[string]any, error) {
	var tasks []newTask
	if err := json.Unmarshal(step.Tasks, &tasks); err != nil {
		return nil, err
	}
	request := &dataqueuev1.InsertRequest{Queue: step.Queue, RequestId: step.RequestID}
	for _, task := range tasks {
		message := &dataqueuev1.NewTask{Headers: task.Headers}
		if task.JSON != nil {
			message.Value = &dataqueuev1.NewTask_Json{Json: *task.JSON}
		} else {
			message.Value = &dataqueuev1.NewTask_Data{Data: task.Data}
		}
		request.Tasks = append(request.Tasks, message)
	}
	response, err := s.calls.Insert(ctx, request)
	if err != nil {
		return nil, err
	}
	if len(response.Results) != len(tasks) {
		return nil, fmt.Errorf("%d results for %d tasks", len(response.Results), len(tasks))
	}
	for i, name := range step.Names {
		id := response.Results[i].Id
		if known := s.named[name]; known == nil {
			s.named[name] = &inserted{id: id, task: tasks[i]}
		} else if known.id != id {
			return nil, fmt.Errorf("%s has another id", name)
		}
	}
	return map[string]any{"replayed": response.Replayed}, nil
}

func (s *scenario) pop(ctx context.Context, step *step) (map[string]any, error) {
	response, err := s.calls.Pop(ctx, &dataqueuev1.PopRequest{Queue: step.Queue, Lease: duration(step.Lease), Wait: duration(step.Wait)})
	if err != nil {
		return nil, err
	}
	if response.Task == nil {
		return map[string]any{"tasks": []string{}}, nil
	}
	return s.delivered([]*dataqueuev1.Task{response.Task})
}

func (s *scenario) popBatch(ctx context.Context, step *step) (map[string]any, error) {
	request := &dataqueuev1.PopBatchRequest{
		Queue: step.Queue, MaxTasks: step.MaxTasks, Lease: duration(step.Lease), Wait: duration(step.Wait),
	}
	stream, err := s.calls.PopBatch(ctx, request)
	if err != nil {
		return nil, err
	}
	var tasks []*dataqueuev1.Task
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return s.delivered(tasks)
		}
		if err != nil {
			return nil, err
		}
		tasks = append(tasks, response.Tasks...)
	}
}

// delivered knows the tasks by their ids, and checks that they are what was inserted.
func (s *scenario) delivered(tasks []*dataqueuev1.Task) (map[string]any, error) {
	names, deliveries := []string{}, []uint32{}
	for _, task := range tasks {
		name := s.nameOf(task.Id)
		known := s.named[name]
		if known == nil {
			return nil, fmt.Errorf("the task %s was not inserted under a name", task.Id)
		}
		value, isJSON := task.Value.(*dataqueuev1.Task_Json)
		isSame := !isJSON && known.task.JSON == nil && bytes.Equal(task.GetData(), known.task.Data)
		if isJSON && known.task.JSON != nil {
			isSame = value.Json == *known.task.JSON
		}
		if !isSame || !maps.Equal(task.Headers, known.task.Headers) {
			return nil, fmt.Errorf("%s is not what was inserted: %v", name, task)
		}
		known.tokens = append(known.tokens, task.LeaseToken)
		names, deliveries = append(names, name), append(deliveries, task.Deliveries)
	}
	return map[string]any{"tasks": names, "deliveries": deliveries}, nil
}

func (s *scenario) nameOf(id string) string {
	for name, known := range s.named {
		if known.id == id {
			return name
		}
	}
	return "?"
}

func (s *scenario) settle(ctx context.Context, step *step) (map[string]any, error) {
	tokens, err := s.tokens(step)
	if err != nil {
		return nil, err
	}
	var outcomes []dataqueuev1.Outcome
	switch step.Do {
	case "heartbeat":
		request := &dataqueuev1.HeartbeatRequest{Queue: step.Queue, LeaseTokens: tokens, Lease: duration(step.Lease)}
		response, failed := s.calls.Heartbeat(ctx, request)
		outcomes, err = response.GetOutcomes(), failed
	case "ack":
		response, failed := s.calls.Ack(ctx, &dataqueuev1.AckRequest{Queue: step.Queue, LeaseTokens: tokens})
		outcomes, err = response.GetOutcomes(), failed
	case "putback":
		given := &dataqueuev1.PutbackTokens{
			LeaseTokens: tokens, Delay: duration(step.Delay), Reason: step.Reason, Failed: step.Failed, DeadLetter: step.DeadLetter,
		}
		request := &dataqueuev1.PutbackRequest{Queue: step.Queue, Selection: &dataqueuev1.PutbackRequest_Tokens{Tokens: given}}
		response, failed := s.calls.Putback(ctx, request)
		outcomes, err = response.GetOutcomes(), failed
	}
	names := []string{}
	for _, outcome := range outcomes {
		names = append(names, strings.TrimPrefix(outcome.String(), "OUTCOME_"))
	}
	return map[string]any{"outcomes": names}, err
}

// tokens are the last ones of `tasks`, and those before the last of `stale`.
func (s *scenario) tokens(step *step) (tokens []string, err error) {
	var names []string
	if step.Tasks != nil {
		if err := json.Unmarshal(step.Tasks, &names); err != nil {
			return nil, err
		}
	}
	add := func(name string, back int) {
		known := s.named[name]
		if known == nil || len(known.tokens) < back {
			err = fmt.Errorf("%s was not delivered so often", name)
			return
		}
		tokens = append(tokens, known.tokens[len(known.tokens)-back])
	}
	for _, name := range names {
		add(name, 1)
	}
	for _, name := range step.Stale {
		add(name, 2)
	}
	return tokens, err
}

// counts waits for them: an ack of a worker may be under way.
func (s *scenario) counts(ctx context.Context, step *step) error {
	for limit := time.Now().Add(countsWithin); ; time.Sleep(20 * time.Millisecond) {
		response, err := s.admin.GetQueue(ctx, &dataqueuev1.GetQueueRequest{Queue: step.Queue})
		if err == nil {
			counts := response.Queue.Counts.ProtoReflect()
			got := map[string]any{}
			for field := range step.Expect {
				if descriptor := counts.Descriptor().Fields().ByName(protoreflect.Name(field)); descriptor != nil {
					got[field] = counts.Get(descriptor).Uint()
				}
			}
			err = compare(step.Expect, got)
		}
		if err == nil || time.Now().After(limit) {
			return err
		}
	}
}

func (s *scenario) dead(ctx context.Context, step *step) (map[string]any, error) {
	request := &dataqueuev1.ListTasksRequest{Queue: step.Queue, State: dataqueuev1.TaskState_TASK_STATE_DEAD}
	names, reasons := []string{}, []string{}
	for {
		page, err := s.admin.ListTasks(ctx, request)
		if err != nil {
			return nil, err
		}
		for _, info := range page.Tasks {
			names, reasons = append(names, s.nameOf(info.Task.Id)), append(reasons, info.LastError)
		}
		if request.PageToken = page.NextPageToken; request.PageToken == "" {
			return map[string]any{"tasks": names, "reasons": reasons}, nil
		}
	}
}

// The producer and the worker.

type numbered struct {
	N int `json:"n"`
}

func numberedTask(n int) dataqueue.NewTask {
	return dataqueue.NewTask{JSON: fmt.Sprintf(`{"n": %d}`, n)}
}

// tally is what the handlers of a step did.
type tally struct {
	mutex                     sync.Mutex
	running, most             int
	handled, failed, rejected int
	failedBefore              map[int]bool
	problem                   error
}

func (t *tally) begin() {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.running++
	t.most = max(t.most, t.running)
}

// judge does as the step asks.
func (t *tally) judge(step *step, task *dataqueue.Task) error {
	var value numbered
	err := json.Unmarshal(task.Value, &value)
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.running--
	switch {
	case err != nil:
		t.problem = cmp.Or(t.problem, err)
	case slices.Contains(step.Reject, value.N):
		t.rejected++
		return dataqueue.Reject(errors.New("rejected, as asked"))
	case slices.Contains(step.Fail, value.N) && !t.failedBefore[value.N]:
		t.failedBefore[value.N] = true
		t.failed++
		return errors.New("failed, as asked")
	case t.failedBefore[value.N] != (task.Failures == 1):
		t.problem = cmp.Or(t.problem, fmt.Errorf("task %d has %d failures", value.N, task.Failures))
	}
	t.handled++
	return nil
}

func (s *scenario) consume(ctx context.Context, step *step) (map[string]any, error) {
	tasks := make([]dataqueue.NewTask, step.Count)
	for n := range tasks {
		tasks[n] = numberedTask(n)
	}
	if _, err := s.producer.Insert(ctx, step.Queue, tasks...); err != nil {
		return nil, err
	}
	working, stop := context.WithCancel(ctx)
	defer stop()
	tally := &tally{failedBefore: map[int]bool{}}
	settled := 0
	worker := &dataqueue.Worker{
		Address: s.address, Queues: []dataqueue.Queue{{Name: step.Queue}}, Concurrency: step.Concurrency,
		Handler: func(_ context.Context, task *dataqueue.Task) error {
			tally.begin()
			time.Sleep(5 * time.Millisecond)
			return tally.judge(step, task)
		},
		Settled: func(of dataqueue.Settlement) {
			if of.Verdict != dataqueue.Failed && !of.IsLost {
				if settled++; settled == step.Count {
					stop()
				}
			}
		},
	}
	if err := worker.Run(working); err != nil {
		return nil, err
	}
	if settled != step.Count {
		return nil, fmt.Errorf("%d of %d tasks were settled in time", settled, step.Count)
	}
	if tally.most > step.Concurrency || step.Concurrency > 1 && tally.most < 2 {
		return nil, fmt.Errorf("%d handlers ran at once", tally.most)
	}
	return map[string]any{"handled": tally.handled, "failed": tally.failed, "rejected": tally.rejected}, tally.problem
}

func (s *scenario) reconnect(ctx context.Context, step *step) (map[string]any, error) {
	working, stop := context.WithCancel(ctx)
	defer stop()
	confirmed := map[int]bool{}
	worker := &dataqueue.Worker{
		Address: s.address, Queues: []dataqueue.Queue{{Name: step.Queue}}, Concurrency: step.Concurrency,
		Handler: func(context.Context, *dataqueue.Task) error { return nil },
		Settled: func(of dataqueue.Settlement) {
			var value numbered
			if of.IsLost || of.Verdict != dataqueue.Acked || json.Unmarshal(of.Task.Value, &value) != nil || confirmed[value.N] {
				return
			}
			confirmed[value.N] = true
			switch len(confirmed) {
			case step.RestartAfter:
				fmt.Println("restart")
			case step.Count:
				stop()
			}
		},
	}
	inserting := make(chan error, 1)
	go func() { inserting <- s.insertOneByOne(ctx, step) }()
	if err := worker.Run(working); err != nil {
		return nil, err
	}
	if err := <-inserting; err != nil {
		return nil, err
	}
	return map[string]any{"handled": len(confirmed)}, nil
}

func (s *scenario) insertOneByOne(ctx context.Context, step *step) error {
	for n := range step.Count {
		if _, err := s.producer.Insert(ctx, step.Queue, numberedTask(n)); err != nil {
			return fmt.Errorf("insert %d: %w", n, err)
		}
	}
	return nil
}
