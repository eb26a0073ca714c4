package dataqueue.client;

import dataqueue.v1.ConsumeOpen;
import dataqueue.v1.ConsumeQueue;
import dataqueue.v1.Task;
import io.grpc.Channel;
import java.time.Duration;
import java.util.Objects;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.Executor;
import java.util.concurrent.atomic.AtomicBoolean;

/**
 * Takes tasks of one or more queues as they come and has a handler work on them, several at once.
 *
 * <p>The worker keeps a stream open to the server, which sends tasks ahead and extends their leases for as long as the connection
 * lives. When the stream breaks, another one with the same session takes over what is held. A task is acked only after its handler
 * returned; no task is handed out twice for one delivery.
 */
public final class Worker implements Runnable, AutoCloseable {
    /** What becomes known of a worker's tasks and streams. Called on the worker's loop: a listener must not block. */
    public interface Listener {
        /** The server has confirmed the ack. */
        default void acked(Task task) {}

        /** The ack came too late, since the lease was lost: the task is delivered again. */
        default void lost(Task task) {}

        /** The handler threw, or did not end within the deadline. */
        default void failed(Task task, String reason) {}

        /** The stream broke; another one is tried after the pause. */
        default void disconnected(DataQueueException error, Duration pause) {}
    }

    private final Session session;
    private final AtomicBoolean hasStarted = new AtomicBoolean();

    private Worker(Builder builder) {
        session = new Session(builder);
    }

    /** Begins to set up a worker. */
    public static Builder builder(Handler handler) {
        return new Builder(handler);
    }

    /**
     * Works until it is stopped, by {@link #stop}, {@link #close} or an interrupt. It may start before its server.
     *
     * @throws DataQueueException if the server refuses what the worker asks for: trying again would not help
     */
    @Override
    public void run() {
        if (hasStarted.getAndSet(true)) {
            throw new IllegalStateException("a worker runs once");
        }
        session.start();
        var isInterrupted = false;
        try {
            while (true) {
                try {
                    session.ended.get();
                    return;
                } catch (InterruptedException interrupt) {
                    isInterrupted = true;
                    stop();
                } catch (ExecutionException end) {
                    throw DataQueueException.of(end.getCause());
                }
            }
        } finally {
            if (isInterrupted) {
                Thread.currentThread().interrupt();
            }
        }
    }

    /**
     * Asks for the end, and does not wait for it: no more tasks come, what no handler has begun goes back, and handlers may finish for as
     * long as the grace says. What still runs then is cancelled and goes back too.
     */
    public void stop() {
        session.stop();
    }

    /** Stops, and waits for the end. */
    @Override
    public void close() {
        if (hasStarted.getAndSet(true)) {
            stop();
            session.ended.handle((done, error) -> null).join();
        } else {
            session.release();
        }
    }

    /** How many acks came too late: those tasks are delivered again. */
    public long lostAcks() {
        return session.lostAcks.get();
    }

    /** How a worker is set up. */
    public static final class Builder {
        final Handler handler;
        final ConsumeOpen.Builder open = ConsumeOpen.newBuilder();
        String address = Channels.defaultAddress();
        Channel channel;
        Executor executor;
        Listener listener = new Listener() {};
        int concurrency = 16;
        Duration deadline;
        Duration grace = Duration.ofSeconds(30);

        private Builder(Handler handler) {
            this.handler = Objects.requireNonNull(handler, "handler");
        }

        /** The server, as {@code HOST:PORT}. Default: DATA_QUEUE_ADDR, or else 127.0.0.1:50051. */
        public Builder address(String address) {
            this.address = Objects.requireNonNull(address, "address");
            return this;
        }

        /** A channel of the caller's instead of an address; see {@link Channels#open}. It is not shut down with the worker. */
        public Builder channel(Channel channel) {
            this.channel = channel;
            return this;
        }

        /** Adds a queue, with weight 1. */
        public Builder queue(String name) {
            return queue(name, 1);
        }

        /** Adds a queue, with its share of the deliveries as long as all queues have tasks: 1 to 100. At most 64 queues. */
        public Builder queue(String name, int weight) {
            open.addQueues(ConsumeQueue.newBuilder().setName(name).setWeight(weight));
            return this;
        }

        /** How many handlers run at once, and how many tasks the server leaves with the worker. Default: 16. */
        public Builder concurrency(int concurrency) {
            this.concurrency = concurrency;
            return this;
        }

        /** For how long tasks are leased, and extended while the connection lives. Default: as the server says. */
        public Builder lease(Duration lease) {
            open.setLease(com.google.protobuf.Duration.newBuilder()
                    .setSeconds(lease.getSeconds())
                    .setNanos(lease.getNano()));
            return this;
        }

        /** How long a handler may take before it is cancelled and its task counts as failed. Default: any time. */
        public Builder deadline(Duration deadline) {
            this.deadline = deadline;
            return this;
        }

        /** How long handlers may take to finish when the worker stops. Default: 30 s. */
        public Builder grace(Duration grace) {
            this.grace = Objects.requireNonNull(grace, "grace");
            return this;
        }

        /** Where handlers run, instead of on threads of the worker's own. It must take as many at once as the concurrency says. */
        public Builder executor(Executor executor) {
            this.executor = executor;
            return this;
        }

        /** Who is told of acks that were confirmed or lost, of failures, and of streams that broke. */
        public Builder listener(Listener listener) {
            this.listener = Objects.requireNonNull(listener, "listener");
            return this;
        }

        /** The worker. Nothing happens before {@link Worker#run}. */
        public Worker build() {
            if (open.getQueuesCount() == 0) {
                throw new IllegalArgumentException("a worker needs a queue");
            }
            if (concurrency < 1) {
                throw new IllegalArgumentException("concurrency is " + concurrency + "; it must be 1 or more");
            }
            return new Worker(this);
        }
    }
}
