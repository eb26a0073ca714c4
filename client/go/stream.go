package dataqueue

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dataqueuev1 "dataqueue/v1"
)

// Nobody's token: a heartbeat for it changes nothing, and its answer tells that all before it was heard.
const nobody = "00000000000000000000000000000000"

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
	// isClear: it has room for a request. isAsked: the server is to be asked for a sign. isHeard: its first message has come. isFenced:
	// the sign tells that the server has heard that no more tasks are wanted. isDraining: the server is about to end it. isClosed: all
	// was said. isGone: nothing that it tells counts any more.
	isClear, isAsked, isHeard, isFenced, isDraining, isClosed, isGone bool
}

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
