// Package dataqueue is a client of DataQueue: a [Worker] that handles the tasks of queues, and a [Producer] that inserts them.
//
// What the server promises is said in the comments of proto/dataqueue/v1; the package dataqueue/v1 has the generated stubs for
// all other calls, over a channel of [Dial].
package dataqueue

import (
	"cmp"
	"context"
	_ "embed"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

//go:generate go run ./internal/generate

//go:embed v1/service_config.json
var serviceConfig string

const (
	defaultAddress = "127.0.0.1:50051"
	// A connection on which nothing came for so long is pinged, and given up when it does not answer for as long again.
	keepaliveInterval = 10 * time.Second
	// More than a server sends unless its limits were raised far beyond the default, and yet a limit.
	maxReceived = 64 << 20
	firstPause  = 100 * time.Millisecond
	maxPause    = 2 * time.Second
)

// Dial makes a channel to a server; it is host:port, with or without http://. Empty, the address is DATA_QUEUE_ADDR of the environment, or else 127.0.0.1:50051. The channel
// connects when it is used, is not encrypted unless an option says so, and repeats by itself only what is safe to repeat.
func Dial(address string, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	address = cmp.Or(address, os.Getenv("DATA_QUEUE_ADDR"), defaultAddress)
	if scheme, rest, has := strings.Cut(address, "://"); has && strings.EqualFold(scheme, "http") {
		address = strings.TrimSuffix(rest, "/")
	}
	connect := backoff.Config{BaseDelay: firstPause, Multiplier: 2, Jitter: 0.2, MaxDelay: maxPause}
	all := append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReceived)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveInterval, Timeout: keepaliveInterval}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: connect, MinConnectTimeout: keepaliveInterval}),
	}, options...)
	conn, err := grpc.NewClient(address, all...)
	if err != nil {
		return nil, invalid("address", "%v", err)
	}
	return conn, nil
}

// pauses grow from 0.1 s to 2 s, a random half of each less.
type pauses struct{ limit time.Duration }

func (p *pauses) next() time.Duration {
	p.limit = min(max(2*p.limit, firstPause), maxPause)
	return p.limit/2 + rand.N(p.limit/2)
}

func (p *pauses) reset() { p.limit = 0 }

// sleep answers false if the context ended first.
func sleep(ctx context.Context, pause time.Duration) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
