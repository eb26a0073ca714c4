package dataqueue.client;

import dataqueue.v1.DataQueueGrpc;
import dataqueue.v1.InsertRequest;
import dataqueue.v1.InsertResponse;
import dataqueue.v1.InsertResult;
import dataqueue.v1.NewTask;
import io.grpc.Channel;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.stub.StreamObserver;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashSet;
import java.util.List;
import java.util.Objects;
import java.util.Set;
import java.util.UUID;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ScheduledThreadPoolExecutor;
import java.util.concurrent.ThreadPoolExecutor;
import java.util.concurrent.TimeUnit;

/**
 * Inserts tasks, each call once: it has a request id, by which the server knows it again when it is repeated.
 *
 * <p>A call is repeated while the server is away or has too much to do, until it is answered, refused, or its timeout has passed.
 * Futures fail with a {@link DataQueueException}; what depends on them runs on gRPC's threads and must not block.
 */
public final class Producer implements AutoCloseable {
    /** Request ids are remembered for five minutes: a repeat after that would insert again. */
    private static final Duration MAX_TIMEOUT = Duration.ofMinutes(5);
    /** One try may take this long, so that a connection that is dead costs not all of the timeout. */
    private static final Duration TRY = Duration.ofSeconds(10);

    private final Channel channel;
    private final ManagedChannel ownChannel;
    private final Duration timeout;
    private final ScheduledThreadPoolExecutor timer;
    private final Set<CompletableFuture<InsertResponse>> underWay = ConcurrentHashMap.newKeySet();

    private Producer(Builder builder) {
        timeout = builder.timeout;
        ownChannel = builder.channel == null ? Channels.open(builder.address) : null;
        channel = builder.channel == null ? ownChannel : builder.channel;
        timer = new ScheduledThreadPoolExecutor(1, work -> {
            var thread = new Thread(work, "data-queue-producer");
            thread.setDaemon(true);
            return thread;
        }, new ThreadPoolExecutor.DiscardPolicy());
        timer.setRemoveOnCancelPolicy(true);
    }

    /** Begins to set up a producer. */
    public static Builder builder() {
        return new Builder();
    }

    /** Inserts 1 to 1,000 tasks, all of them or none. */
    public CompletableFuture<InsertResponse> insert(String queue, NewTask... tasks) {
        return insert(InsertRequest.newBuilder().setQueue(queue).addAllTasks(List.of(tasks)).build());
    }

    /** Inserts as the request says; if it has no request id it gets one. */
    public CompletableFuture<InsertResponse> insert(InsertRequest request) {
        var call = new Call(request.getRequestId().isEmpty()
                ? request.toBuilder().setRequestId(UUID.randomUUID().toString()).build()
                : request);
        underWay.add(call.answer);
        call.answer.whenComplete((answer, error) -> underWay.remove(call.answer));
        call.attempt();
        return call.answer;
    }

    /** Collects tasks for a queue, to insert many with one call. */
    public Batch batch(String queue) {
        return new Batch(queue);
    }

    /** Waits for the calls that are under way, each for no longer than its timeout, and ends. Close batches before. */
    @Override
    public void close() {
        CompletableFuture.allOf(underWay.toArray(CompletableFuture<?>[]::new)).handle((all, error) -> null).join();
        timer.shutdownNow();
        if (ownChannel != null) {
            ownChannel.shutdownNow();
        }
    }

    /** One insert, however many tries it takes. */
    private final class Call {
        private final InsertRequest request;
        private final long start = System.nanoTime();
        private final Backoff backoff = new Backoff();
        private final CompletableFuture<InsertResponse> answer = new CompletableFuture<>();

        private Call(InsertRequest request) {
            this.request = request;
        }

        private Duration left() {
            return timeout.minusNanos(System.nanoTime() - start);
        }

        private void attempt() {
            if (answer.isDone()) {
                return;
            }
            var left = left();
            var patience = left.compareTo(TRY) < 0 ? left : TRY;
            DataQueueGrpc.newStub(channel)
                    .withDeadlineAfter(patience.toNanos(), TimeUnit.NANOSECONDS)
                    .insert(request, new StreamObserver<>() {
                        @Override
                        public void onNext(InsertResponse response) {
                            if (response.getResultsCount() == request.getTasksCount()) {
                                answer.complete(response);
                            }
                        }

                        @Override
                        public void onError(Throwable error) {
                            failed(DataQueueException.of(error));
                        }

                        @Override
                        public void onCompleted() {
                            answer.completeExceptionally(new DataQueueException(
                                    Status.Code.INTERNAL, "the server did not answer one result for each task", null));
                        }
                    });
        }

        private void failed(DataQueueException error) {
            var pause = backoff.after(error);
            if (!error.mayPass() || timer.isShutdown()) {
                answer.completeExceptionally(error);
            } else if (pause.compareTo(left()) >= 0) {
                answer.completeExceptionally(new DataQueueException(
                        Status.Code.DEADLINE_EXCEEDED,
                        "the insert was not answered within " + timeout.toMillis() + " ms; the last try: " + error.getMessage(),
                        error));
            } else {
                timer.schedule(() -> {
                    Channels.hurry(channel);
                    attempt();
                }, pause.toNanos(), TimeUnit.NANOSECONDS);
            }
        }
    }

    /** Tasks that are inserted together. */
    private static final class Lot {
        private final List<NewTask> tasks = new ArrayList<>();
        private final List<CompletableFuture<InsertResult>> results = new ArrayList<>();
        private final CompletableFuture<Void> done = new CompletableFuture<>();
        private long bytes;
        /** It was collected for long enough. */
        private boolean isDue;

        private boolean hasRoomFor(long size) {
            return tasks.isEmpty() || (tasks.size() < Batch.MAX_TASKS && bytes + size <= Batch.MAX_BYTES);
        }

        private boolean isFull() {
            return !hasRoomFor(1);
        }

        private void answered(InsertResponse response, Throwable error) {
            for (var at = 0; at < results.size(); at++) {
                if (error == null) {
                    results.get(at).complete(response.getResults(at));
                } else {
                    results.get(at).completeExceptionally(error);
                }
            }
            done.complete(null);
        }
    }

    /**
     * Inserts what is added within 5 ms, up to 1,000 tasks or 1 MiB, with one call. A refusal is that of all tasks of the call. At most
     * 4 calls are under way: they may overtake each other, so the order of tasks is kept only within a call.
     */
    public final class Batch implements AutoCloseable {
        private static final int MAX_TASKS = 1_000;
        private static final long MAX_BYTES = 1 << 20;
        private static final long LINGER_MS = 5;
        private static final int MAX_UNDER_WAY = 4;

        private final String queue;
        private final Set<Lot> sent = new HashSet<>();
        private Lot open = new Lot();
        private boolean isClosed;

        private Batch(String queue) {
            this.queue = queue;
        }

        /** Adds a task; the future tells its id. Waits while as much is collected and under way as may be. */
        public CompletableFuture<InsertResult> add(NewTask task) throws InterruptedException {
            var size = task.getSerializedSize();
            var result = new CompletableFuture<InsertResult>();
            synchronized (this) {
                while (!isClosed && !open.hasRoomFor(size)) {
                    if (!send()) {
                        wait();
                    }
                }
                if (isClosed) {
                    throw new IllegalStateException("the batch is closed");
                }
                open.tasks.add(task);
                open.results.add(result);
                open.bytes += size;
                if (open.isFull()) {
                    send();
                } else if (open.tasks.size() == 1) {
                    var lot = open;
                    timer.schedule(() -> due(lot), LINGER_MS, TimeUnit.MILLISECONDS);
                }
            }
            return result;
        }

        /** Waits until all that was added before is answered, well or not. */
        public void flush() {
            List<CompletableFuture<Void>> all = new ArrayList<>();
            synchronized (this) {
                sent.forEach(lot -> all.add(lot.done));
                if (!open.tasks.isEmpty()) {
                    all.add(open.done);
                    due(open);
                }
            }
            CompletableFuture.allOf(all.toArray(CompletableFuture<?>[]::new)).join();
        }

        /** Takes no more tasks, and waits as {@link #flush} does. */
        @Override
        public void close() {
            synchronized (this) {
                isClosed = true;
                notifyAll();
            }
            flush();
        }

        private synchronized void due(Lot lot) {
            lot.isDue = true;
            if (lot == open) {
                send();
            }
        }

        /** Sends what is collected, if there is any and a call may be made. Called under the lock. */
        private boolean send() {
            if (open.tasks.isEmpty() || sent.size() >= MAX_UNDER_WAY) {
                return false;
            }
            var lot = open;
            open = new Lot();
            sent.add(lot);
            var request = InsertRequest.newBuilder().setQueue(queue).addAllTasks(lot.tasks).build();
            insert(request).whenComplete((response, error) -> {
                answered(lot);
                lot.answered(response, error);
            });
            return true;
        }

        private synchronized void answered(Lot lot) {
            sent.remove(lot);
            if (open.isDue || open.isFull()) {
                send();
            }
            notifyAll();
        }
    }

    /** How a producer is set up. */
    public static final class Builder {
        private String address = Channels.defaultAddress();
        private Channel channel;
        private Duration timeout = Duration.ofSeconds(30);

        private Builder() {}

        /** The server, as {@code HOST:PORT}. Default: DATA_QUEUE_ADDR, or else 127.0.0.1:50051. */
        public Builder address(String address) {
            this.address = Objects.requireNonNull(address, "address");
            return this;
        }

        /** A channel of the caller's instead of an address; see {@link Channels#open}. It is not shut down with the producer. */
        public Builder channel(Channel channel) {
            this.channel = channel;
            return this;
        }

        /** How long a call may take with all its tries: less than 5 minutes. Default: 30 s. */
        public Builder timeout(Duration timeout) {
            if (timeout.isNegative() || timeout.isZero() || timeout.compareTo(MAX_TIMEOUT) >= 0) {
                throw new IllegalArgumentException("the timeout is " + timeout + "; it must be less than 5 minutes");
            }
            this.timeout = timeout;
            return this;
        }

        /** The producer. It connects when it is used. */
        public Producer build() {
            return new Producer(this);
        }
    }
}
