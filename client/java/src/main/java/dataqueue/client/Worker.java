package dataqueue.client;

import com.google.protobuf.ByteString;
import dataqueue.client.Context.Cancellation;
import dataqueue.v1.ConsumeAck;
import dataqueue.v1.ConsumeAnswer;
import dataqueue.v1.ConsumeHeartbeat;
import dataqueue.v1.ConsumeOpen;
import dataqueue.v1.ConsumePutback;
import dataqueue.v1.ConsumeQueue;
import dataqueue.v1.ConsumeRequest;
import dataqueue.v1.ConsumeResponse;
import dataqueue.v1.DataQueueGrpc;
import dataqueue.v1.Outcome;
import dataqueue.v1.ResumedQueue;
import dataqueue.v1.Task;
import io.grpc.Channel;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.stub.ClientCallStreamObserver;
import io.grpc.stub.ClientResponseObserver;
import java.lang.System.Logger;
import java.lang.System.Logger.Level;
import java.math.BigDecimal;
import java.nio.charset.StandardCharsets;
import java.security.SecureRandom;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.HashSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.Executor;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.ScheduledFuture;
import java.util.concurrent.ScheduledThreadPoolExecutor;
import java.util.concurrent.ThreadFactory;
import java.util.concurrent.ThreadPoolExecutor;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.concurrent.atomic.AtomicLong;

/**
 * Takes tasks of one or more queues as they come and has a handler work on them, several at once.
 *
 * <p>The worker keeps a stream open to the server, which sends tasks ahead and extends their leases for as long as the connection
 * lives. When the stream breaks, another one with the same session takes over what is held. A task is acked only after its handler
 * returned; no task is handed out twice for one delivery.
 *
 * <p>One thread, the loop, owns all that a worker knows, and runs what gRPC, the handlers' threads and the timers have to tell. Handlers
 * never run on it, so a busy handler does not hold up the stream.
 */
public final class Worker implements Runnable, AutoCloseable {
    private static final Logger LOG = System.getLogger(Worker.class.getName());
    private static final int SESSION_BYTES = 16;
    private static final int MAX_REASON_BYTES = 1_024;
    /** The most tokens in one request. */
    private static final int MAX_BATCH = 1_000;
    /** How long a worker that has finished waits for the last answers. */
    private static final Duration FAREWELL = Duration.ofSeconds(5);
    /** A stream that lived for less has proved nothing: drained, it is not replaced at once. */
    private static final Duration YOUNG = Duration.ofSeconds(1);
    /** No task has this token. A heartbeat for it is answered behind all that was sent before. */
    private static final String FENCE = "0".repeat(32);

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

    /** What is to be said about tasks; those with equal wishes go in one request. */
    private record Wish(Kind kind, String queue, String reason) {
        enum Kind {
            ACK,
            PUT_BACK,
            FAIL,
            REJECT,
            FENCE
        }
    }

    /** A request that was sent and not answered. */
    private record Sent(Wish wish, List<String> tokens) {}

    private final Handler handler;
    private final Listener listener;
    private final ConsumeOpen open;
    private final int concurrency;
    private final Duration deadline;
    private final Duration grace;
    private final Executor handlers;
    private final ExecutorService ownHandlers;
    private final Channel channel;
    private final ManagedChannel ownChannel;
    private final ScheduledThreadPoolExecutor loop;
    private final AtomicBoolean hasStarted = new AtomicBoolean();
    private final AtomicLong lostAcks = new AtomicLong();
    private final CompletableFuture<Void> ended = new CompletableFuture<>();

    // All from here on is the loop's.
    private final Map<String, Delivery> held = new HashMap<>();
    private final ArrayDeque<Delivery> waiting = new ArrayDeque<>();
    private final Map<Wish, List<String>> wishes = new LinkedHashMap<>();
    private final Set<Line> lines = new HashSet<>();
    private final Backoff backoff = new Backoff();
    /** The stream that is spoken on; null while none is to be tried yet. */
    private Line current;
    private int running;
    private boolean isFlushDue;
    private boolean isStopping;
    private boolean isFinishing;
    private ScheduledFuture<?> farewell;
    private DataQueueException failure;

    private Worker(Builder builder) {
        handler = builder.handler;
        listener = builder.listener;
        concurrency = builder.concurrency;
        deadline = builder.deadline;
        grace = builder.grace;
        ownHandlers = builder.executor == null ? Executors.newCachedThreadPool(daemons("data-queue-handler")) : null;
        handlers = builder.executor == null ? ownHandlers : builder.executor;
        ownChannel = builder.channel == null ? Channels.open(builder.address) : null;
        channel = builder.channel == null ? ownChannel : builder.channel;
        loop = new ScheduledThreadPoolExecutor(
                1, daemons("data-queue-worker"), new ThreadPoolExecutor.DiscardPolicy());
        loop.setRemoveOnCancelPolicy(true);
        loop.setExecuteExistingDelayedTasksAfterShutdownPolicy(false);
        var session = new byte[SESSION_BYTES];
        new SecureRandom().nextBytes(session);
        open = builder.open.setMaxOutstanding(concurrency).setSession(ByteString.copyFrom(session)).build();
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
        post(this::start);
        var isInterrupted = false;
        try {
            while (true) {
                try {
                    ended.get();
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
        post(this::beginStop);
    }

    /** Stops, and waits for the end. */
    @Override
    public void close() {
        if (hasStarted.getAndSet(true)) {
            stop();
            ended.handle((done, error) -> null).join();
        } else {
            release();
        }
    }

    /** How many acks came too late: those tasks are delivered again. */
    public long lostAcks() {
        return lostAcks.get();
    }

    private static ThreadFactory daemons(String name) {
        return work -> {
            var thread = new Thread(work, name);
            thread.setDaemon(true);
            return thread;
        };
    }

    private void post(Runnable event) {
        loop.execute(() -> guard(event));
    }

    private ScheduledFuture<?> schedule(Duration delay, Runnable event) {
        return loop.schedule(() -> guard(event), delay.toNanos(), TimeUnit.NANOSECONDS);
    }

    private void guard(Runnable event) {
        try {
            event.run();
        } catch (RuntimeException bug) {
            LOG.log(Level.ERROR, "the worker ends because of a bug", bug);
            fail(new DataQueueException(Status.Code.INTERNAL, "a bug in the worker: " + bug, bug));
        }
    }

    // How it begins and ends.

    private void start() {
        if (isStopping) {
            end();
        } else {
            connect();
        }
    }

    private void beginStop() {
        if (isStopping) {
            return;
        }
        isStopping = true;
        waiting.clear();
        held.values().stream().filter(delivery -> !delivery.isSettled && delivery.withdraw()).forEach(this::putBack);
        if (current != null) {
            current.sayStop();
        }
        schedule(grace, this::giveUp);
        finishIfDone();
    }

    /** The grace has passed. What a handler does from now on does not count. */
    private void giveUp() {
        held.values().stream().filter(delivery -> !delivery.isSettled).forEach(delivery -> {
            putBack(delivery);
            delivery.cancel(Cancellation.STOPPED);
        });
        finishIfDone();
    }

    /** Ends a worker that was stopped, once nothing is worked on, to be said or to be answered. */
    private void finishIfDone() {
        if (!isStopping || isFinishing || failure != null
                || held.values().stream().anyMatch(delivery -> !delivery.isSettled)) {
            return;
        }
        if (farewell == null) {
            farewell = schedule(FAREWELL, this::end);
        }
        if (held.isEmpty() && wishes.isEmpty() && lines.stream().allMatch(line -> line.sent.isEmpty())) {
            isFinishing = true;
            if (current == null) {
                end();
            } else {
                current.requests.onCompleted();
            }
        }
    }

    /** Ends with an error: handlers are cancelled, and waited for as long as the grace says. */
    private void fail(DataQueueException error) {
        if (failure != null) {
            return;
        }
        failure = error;
        waiting.clear();
        held.values().forEach(delivery -> {
            delivery.withdraw();
            delivery.cancel(Cancellation.LEASE_LOST);
        });
        schedule(grace, this::end);
        if (running == 0) {
            end();
        }
    }

    private void end() {
        if (!held.isEmpty()) {
            LOG.log(Level.WARNING, "the worker ends without an answer about " + held.size() + " tasks");
        }
        release();
        if (failure == null) {
            ended.complete(null);
        } else {
            ended.completeExceptionally(failure);
        }
    }

    private void release() {
        List.copyOf(lines).forEach(line -> line.requests.cancel("the worker has ended", null));
        loop.shutdown();
        if (ownHandlers != null) {
            ownHandlers.shutdown();
        }
        if (ownChannel != null) {
            ownChannel.shutdownNow();
        }
    }

    // Streams.

    private void connect() {
        Channels.hurry(channel);
        current = new Line();
        lines.add(current);
        DataQueueGrpc.newStub(channel).withExecutor(loop).consume(current);
        current.requests.onNext(ConsumeRequest.newBuilder().setOpen(open).build());
        if (isStopping) {
            current.sayStop();
        }
    }

    private void receive(Line line, ConsumeResponse message) {
        if (line.isNew) {
            line.isNew = false;
            resume(message.getResumedList());
        }
        message.getTasksList().forEach(this::deliver);
        message.getAnswersList().forEach(answer -> hear(line, answer));
        message.getCancelList().stream()
                .flatMap(cancelled -> cancelled.getLeaseTokensList().stream())
                .map(held::get)
                .filter(Objects::nonNull)
                .forEach(delivery -> delivery.cancel(Cancellation.DELETED));
        if (message.getTasksCount() > 0 || message.getAnswersCount() > 0) {
            backoff.reset();
        }
        if (message.getDrain() && line == current) {
            LOG.log(Level.DEBUG, "the server drains its stream");
            Channels.leave(channel);
            again(line.isYoung() ? backoff.after(line.end(null)) : Duration.ZERO);
        }
        finishIfDone();
    }

    /** A new stream tells what it took over. */
    private void resume(List<ResumedQueue> resumed) {
        var tokens = new HashSet<String>();
        for (var queue : resumed) {
            for (var token : queue.getLeaseTokensList()) {
                tokens.add(token);
                if (!held.containsKey(token)) {
                    // It was lost on its way here.
                    ask(new Wish(Wish.Kind.PUT_BACK, queue.getQueue(), ""), token);
                }
            }
        }
        held.forEach((token, delivery) -> {
            if (!delivery.isSettled && !tokens.contains(token)) {
                if (delivery.withdraw()) {
                    putBack(delivery);
                } else {
                    delivery.cancel(Cancellation.LEASE_LOST);
                }
            }
        });
    }

    private void broken(Line line, DataQueueException error) {
        lines.remove(line);
        for (var sent : line.sent) {
            if (sent.wish.kind != Wish.Kind.FENCE) {
                // What was said and not answered is said again: an ack that was applied answers ALREADY_ACKED.
                sent.tokens.forEach(token -> ask(sent.wish, token));
            }
        }
        line.sent.clear();
        if (line != current || failure != null) {
            return;
        }
        current = null;
        if (isFinishing) {
            end();
        } else if (canBeWaitedOut(error)) {
            var pause = backoff.after(error);
            LOG.log(Level.INFO, () -> "the stream broke, another one is tried in " + pause + ": " + error.getMessage());
            if (error.reason().filter("SHUTTING_DOWN"::equals).isPresent()) {
                Channels.leave(channel);
            }
            tell(() -> listener.disconnected(error, pause));
            again(pause);
            finishIfDone();
        } else {
            fail(error);
        }
    }

    private void again(Duration pause) {
        current = null;
        if (pause.isZero()) {
            connect();
        } else {
            schedule(pause, () -> {
                if (failure == null) {
                    connect();
                }
            });
        }
    }

    private static boolean canBeWaitedOut(DataQueueException error) {
        return error.mayPass() || error.code() == Status.Code.INTERNAL;
    }

    // Tasks.

    private void deliver(Task task) {
        var delivery = new Delivery(task);
        if (failure != null || held.putIfAbsent(task.getLeaseToken(), delivery) != null) {
            return;
        }
        if (isStopping) {
            putBack(delivery);
        } else {
            waiting.add(delivery);
            handOut();
        }
    }

    private void handOut() {
        while (running < concurrency && !waiting.isEmpty()) {
            var delivery = waiting.remove();
            if (!delivery.isSettled) {
                try {
                    handlers.execute(() -> work(delivery));
                    running++;
                } catch (RejectedExecutionException full) {
                    fail(new DataQueueException(Status.Code.INTERNAL, "the executor takes no handler", full));
                }
            }
        }
    }

    /** What a handler's thread does. */
    private void work(Delivery delivery) {
        Throwable thrown = null;
        if (delivery.begin()) {
            var timer = deadline == null ? null : schedule(deadline, () -> {
                delivery.isLate = true;
                delivery.cancel(Cancellation.DEADLINE);
            });
            try {
                var damage = delivery.damage();
                if (damage.isPresent()) {
                    throw new IllegalStateException(damage.get());
                }
                handler.handle(delivery.task, delivery);
            } catch (Throwable error) {
                thrown = error;
            } finally {
                delivery.end();
                if (timer != null) {
                    timer.cancel(false);
                }
            }
        }
        var error = thrown;
        post(() -> {
            running--;
            worked(delivery, error);
        });
    }

    private void worked(Delivery delivery, Throwable thrown) {
        if (failure != null) {
            if (running == 0) {
                end();
            }
            return;
        }
        if (!delivery.isSettled) {
            settle(delivery, thrown);
        }
        handOut();
        finishIfDone();
    }

    private void settle(Delivery delivery, Throwable thrown) {
        var cancellation = delivery.cancellation().orElse(null);
        if (delivery.isLate) {
            var seconds = BigDecimal.valueOf(deadline.toMillis(), 3).stripTrailingZeros().toPlainString();
            fail(delivery, "deadline of " + seconds + " s passed");
        } else if (thrown == null) {
            settle(delivery, Wish.Kind.ACK, "");
        } else if (thrown instanceof Reject) {
            settle(delivery, Wish.Kind.REJECT, reason(thrown));
        } else if (cancellation != null) {
            putBack(delivery);
        } else {
            LOG.log(Level.DEBUG, () -> "task " + delivery.task.getId() + " failed", thrown);
            fail(delivery, reason(thrown));
        }
    }

    private void fail(Delivery delivery, String reason) {
        settle(delivery, Wish.Kind.FAIL, reason);
        tell(() -> listener.failed(delivery.task, reason));
    }

    private void putBack(Delivery delivery) {
        settle(delivery, Wish.Kind.PUT_BACK, "");
    }

    private void settle(Delivery delivery, Wish.Kind kind, String reason) {
        delivery.isSettled = true;
        ask(new Wish(kind, delivery.task.getQueue(), reason), delivery.task.getLeaseToken());
    }

    /** The text of an error, cut to what the server takes, and not within a character. */
    static String reason(Throwable error) {
        var message = error.getMessage();
        var bytes = (message == null || message.isEmpty() ? error.toString() : message).getBytes(StandardCharsets.UTF_8);
        var length = Math.min(bytes.length, MAX_REASON_BYTES);
        while (length < bytes.length && length > 0 && (bytes[length] & 0xC0) == 0x80) {
            length--;
        }
        return new String(bytes, 0, length, StandardCharsets.UTF_8);
    }

    // What is said and answered.

    private void ask(Wish wish, String token) {
        wishes.computeIfAbsent(wish, any -> new ArrayList<>()).add(token);
        if (!isFlushDue) {
            // What is asked for by the events that wait already goes together with it.
            isFlushDue = true;
            post(this::flush);
        }
    }

    /** Says what is to be said, if the stream has room; it tells when it has again. */
    private void flush() {
        isFlushDue = false;
        if (current == null || isFinishing || !current.requests.isReady()) {
            return;
        }
        wishes.forEach((wish, tokens) -> {
            for (var from = 0; from < tokens.size(); from += MAX_BATCH) {
                current.say(wish, tokens.subList(from, Math.min(from + MAX_BATCH, tokens.size())));
            }
        });
        wishes.clear();
    }

    private void hear(Line line, ConsumeAnswer answer) {
        var sent = line.sent.poll();
        if (sent == null || answer.getOutcomesCount() != sent.tokens.size()) {
            throw new IllegalStateException("the server answered what it was not asked");
        }
        for (var at = 0; at < sent.tokens.size(); at++) {
            var delivery = held.remove(sent.tokens.get(at));
            if (delivery != null && sent.wish.kind == Wish.Kind.ACK) {
                acked(delivery.task, answer.getOutcomes(at));
            }
        }
    }

    private void acked(Task task, Outcome outcome) {
        switch (outcome) {
            case OUTCOME_APPLIED, OUTCOME_ALREADY_ACKED -> tell(() -> listener.acked(task));
            default -> {
                lostAcks.incrementAndGet();
                LOG.log(Level.WARNING, () -> "the lease of task " + task.getId() + " was lost before its ack");
                tell(() -> listener.lost(task));
            }
        }
    }

    private void tell(Runnable news) {
        try {
            news.run();
        } catch (RuntimeException error) {
            LOG.log(Level.WARNING, "the worker's listener failed", error);
        }
    }

    /** One stream. gRPC calls it on the loop, one message at a time. */
    private final class Line implements ClientResponseObserver<ConsumeRequest, ConsumeResponse> {
        private final ArrayDeque<Sent> sent = new ArrayDeque<>();
        private final long since = System.nanoTime();
        private ClientCallStreamObserver<ConsumeRequest> requests;
        private boolean isNew = true;

        @Override
        public void beforeStart(ClientCallStreamObserver<ConsumeRequest> stream) {
            requests = stream;
            stream.disableAutoRequestWithInitial(1);
            stream.setOnReadyHandler(() -> guard(Worker.this::flush));
        }

        @Override
        public void onNext(ConsumeResponse message) {
            try {
                receive(this, message);
                requests.request(1);
            } catch (IllegalStateException confusion) {
                requests.cancel(confusion.getMessage(), confusion);
            }
        }

        @Override
        public void onError(Throwable error) {
            guard(() -> broken(this, DataQueueException.of(error)));
        }

        @Override
        public void onCompleted() {
            guard(() -> broken(this, end(null)));
        }

        private DataQueueException end(Throwable cause) {
            return new DataQueueException(Status.Code.UNAVAILABLE, "the server ended the stream", cause);
        }

        private boolean isYoung() {
            return System.nanoTime() - since < YOUNG.toNanos();
        }

        private void sayStop() {
            requests.onNext(ConsumeRequest.newBuilder().setMaxOutstanding(0).build());
            // Its answer comes behind the tasks that are on their way: these are put back before the stream is closed.
            say(new Wish(Wish.Kind.FENCE, open.getQueues(0).getName(), ""), List.of(FENCE));
        }

        private void say(Wish wish, List<String> tokens) {
            var request = ConsumeRequest.newBuilder();
            switch (wish.kind) {
                case ACK -> request.setAck(
                        ConsumeAck.newBuilder().setQueue(wish.queue).addAllLeaseTokens(tokens));
                case FENCE -> request.setHeartbeat(
                        ConsumeHeartbeat.newBuilder().setQueue(wish.queue).addAllLeaseTokens(tokens));
                default -> request.setPutback(ConsumePutback.newBuilder()
                        .setQueue(wish.queue)
                        .addAllLeaseTokens(tokens)
                        .setReason(wish.reason)
                        .setFailed(wish.kind == Wish.Kind.FAIL)
                        .setDeadLetter(wish.kind == Wish.Kind.REJECT));
            }
            sent.add(new Sent(wish, List.copyOf(tokens)));
            requests.onNext(request.build());
        }
    }

    /** How a worker is set up. */
    public static final class Builder {
        private final Handler handler;
        private final ConsumeOpen.Builder open = ConsumeOpen.newBuilder();
        private String address = Channels.defaultAddress();
        private Channel channel;
        private Executor executor;
        private Listener listener = new Listener() {};
        private int concurrency = 16;
        private Duration deadline;
        private Duration grace = Duration.ofSeconds(30);

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
