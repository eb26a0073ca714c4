// Program tries the Go client on a server: `scenario` runs the steps that every client runs, `work` is a worker that tells what it
// does.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

const usage = `usage:
  program scenario --addr HOST:PORT --file client/scenario.json --prefix P
  program work --addr HOST:PORT --queue Q [--concurrency N] [--fail-every N] [--hold MS] [--grace MS]`

func main() {
	if len(os.Args) < 2 {
		refuse()
	}
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	address := flags.String("addr", "", "the server; default: DATA_QUEUE_ADDR, or else 127.0.0.1:50051")
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var err error
	switch os.Args[1] {
	case "scenario":
		file := flags.String("file", "../scenario.json", "the steps")
		prefix := flags.String("prefix", "go", "the first part of the queues' names")
		flags.Parse(os.Args[2:])
		err = runScenario(ctx, *address, *file, *prefix)
	case "work":
		var w work
		flags.StringVar(&w.queue, "queue", "", "the queue")
		flags.IntVar(&w.concurrency, "concurrency", 16, "how many handlers run at once")
		flags.Int64Var(&w.failEvery, "fail-every", 0, "which deliveries fail: every so many; 0: none")
		hold := flags.Int64("hold", 0, "how long a handler takes, in ms")
		grace := flags.Int64("grace", 30_000, "how long handlers may go on after SIGTERM, in ms")
		flags.Parse(os.Args[2:])
		w.hold, w.grace = time.Duration(*hold)*time.Millisecond, time.Duration(*grace)*time.Millisecond
		err = w.run(ctx, *address)
	default:
		refuse()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func refuse() {
	fmt.Fprintln(os.Stderr, usage)
	os.Exit(2)
}
