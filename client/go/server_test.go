package dataqueue

import (
	"bufio"
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	dataqueuev1 "dataqueue/v1"
)

// patience is for what must happen; nothing waits for so long unless it fails.
const patience = 30 * time.Second

// server is a real one, with a store in a file that outlives it.
type server struct {
	t       *testing.T
	address string
	flags   []string
	process *exec.Cmd
	admin   dataqueuev1.QueueAdminClient
	calls   dataqueuev1.DataQueueClient
}

func newServer(t *testing.T, flags ...string) *server {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	s := &server{t: t, address: free.Addr().String(), flags: append([]string{"--data-dir", t.TempDir()}, flags...)}
	check(t, free.Close())
	conn, err := Dial(s.address)
	check(t, err)
	s.admin, s.calls = dataqueuev1.NewQueueAdminClient(conn), dataqueuev1.NewDataQueueClient(conn)
	t.Cleanup(func() {
		conn.Close()
		s.kill()
	})
	return s
}

func startServer(t *testing.T, flags ...string) *server {
	s := newServer(t, flags...)
	s.start()
	return s
}

func (s *server) start() {
	s.t.Helper()
	binary := os.Getenv("DATA_QUEUE_SERVER")
	if binary == "" {
		binary, _ = filepath.Abs("../../target/debug/data-queue-server")
	}
	if _, err := os.Stat(binary); err != nil {
		s.t.Fatalf("no server: %v; make it with `cargo build -p data-queue-server`, or name one in DATA_QUEUE_SERVER", err)
	}
	s.process = exec.Command(binary, append([]string{"--listen", s.address}, s.flags...)...)
	output, err := s.process.StdoutPipe()
	check(s.t, err)
	check(s.t, s.process.Start())
	lines := bufio.NewScanner(output)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "listening on ") {
			return
		}
	}
	s.t.Fatal("the server did not start")
}

// kill ends it as a power cut would.
func (s *server) kill() {
	if s.process != nil {
		s.process.Process.Kill()
		s.process.Wait()
		s.process = nil
	}
}

func (s *server) counts(queue string) *dataqueuev1.QueueCounts {
	answer, err := s.admin.GetQueue(context.Background(), &dataqueuev1.GetQueueRequest{Queue: queue})
	if err != nil {
		return &dataqueuev1.QueueCounts{}
	}
	return answer.Queue.Counts
}

// insert inserts tasks {"n": 0}, {"n": 1}, …
func (s *server) insert(queue string, count int) []Inserted {
	s.t.Helper()
	producer := newProducer(s.t, s.address)
	tasks := make([]NewTask, count)
	for n := range tasks {
		text, _ := json.Marshal(numbered{n})
		tasks[n].JSON = string(text)
	}
	inserted, err := producer.Insert(context.Background(), queue, tasks...)
	check(s.t, err)
	return inserted
}

type numbered struct {
	N int `json:"n"`
}

func number(task *Task) int {
	var value numbered
	if json.Unmarshal(task.Value, &value) != nil {
		return -1
	}
	return value.N
}

func newProducer(t *testing.T, address string) *Producer {
	t.Helper()
	producer, err := NewProducer(ProducerConfig{Address: address})
	check(t, err)
	t.Cleanup(func() { producer.Close() })
	return producer
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for limit := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("it did not come to this in time: %s", what)
		}
	}
}

func await[T any](t *testing.T, what string, from <-chan T) (got T) {
	t.Helper()
	select {
	case got = <-from:
	case <-time.After(patience):
		t.Fatalf("it did not come in time: %s", what)
	}
	return got
}
