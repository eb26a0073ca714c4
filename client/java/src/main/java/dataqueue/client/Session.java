package dataqueue.client;

import com.google.protobuf.ByteString;
import dataqueue.client.Context.Cancellation;
import dataqueue.client.Line.Wish;
import dataqueue.v1.ConsumeAnswer;
import dataqueue.v1.ConsumeOpen;
import dataqueue.v1.ConsumeRequest;
import dataqueue.v1.ConsumeResponse;
import dataqueue.v1.DataQueueGrpc;
import dataqueue.v1.Outcome;
import dataqueue.v1.ResumedQueue;
import dataqueue.v1.Task;
import io.grpc.Channel;
import io.grpc.ManagedChannel;
import io.grpc.Status;
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
import java.util.concurrent.Executor;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.ScheduledFuture;
import java.util.concurrent.ScheduledThreadPoolExecutor;
import java.util.concurrent.ThreadFactory;
import java.util.concurrent.ThreadPoolExecutor;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;

/**
 * One run of a worker.
 *
 * <p>One thread, the loop, owns all that a worker knows, and runs what gRPC, the handlers' threads and the timers have to tell. Handlers
 * never run on it, so a busy handler does not hold up the stream.
 */
final class Session {
    private static final Logger LOG = System.getLogger(Worker.class.getName());
    private static final int SESSION_BYTES = 16;
    private static final int MAX_REASON_BYTES = 1_024;
    /** The most tokens in one request. */
    private static final int MAX_BATCH = 1_000;
    /** How long a stream may take to open: a connection whose other end accepts it and says nothing is not noticed by pings. */
    private static final Duration OPEN_WITHIN = Duration.ofSeconds(20);
    /** How long a worker that has finished waits for the last answers. */
    private static final Duration FAREWELL = Duration.ofSeconds(5);

    private final Handler handler;
    private final Worker.Listener listener;
    private final ConsumeOpen open;
    private final int concurrency;
    private final Duration deadline;
    private final Duration grace;
    private final Executor handlers;
    private final ExecutorService ownHandlers;
    private final Channel channel;
    private final ManagedChannel ownChannel;
    private final ScheduledThreadPoolExecutor loop;
    final AtomicLong lostAcks = new AtomicLong();
    final CompletableFuture<Void> ended = new CompletableFuture<>();

    // All from here on is the loop's.
    private final Map<String, Delivery> held = new HashMap<>();
    private final ArrayDeque<Delivery> waiting = new ArrayDeque<>();
    private final Map<Wish, List<String>> wishes = new LinkedHashMap<>();
    private final Set<Line> lines = new HashSet<>();
    private final Backoff backoff = new Backoff();
    /** The stream that is spoken on: the last one that was heard, until it ends. Null while there is none. */
    private Line current;
    /** One that is being opened. Until it is heard, that before it is the one that still takes acks. */
    private Line opening;
    /** Another one is tried after a pause. */
    private boolean isPausing;
    private int running;
    /** The session was lost to another stream, and none has brought anything since. */
    private boolean wasTakenOver;
    private boolean isFlushDue;
    private boolean isStopping;
    private boolean isFinishing;
    private ScheduledFuture<?> farewell;
    private DataQueueException failure;

    Session(Worker.Builder builder) {
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

    void guard(Runnable event) {
        try {
            event.run();
        } catch (RuntimeException | Error bug) {
            LOG.log(Level.ERROR, "the worker ends because of a bug", bug);
            fail(new DataQueueException(Status.Code.INTERNAL, "a bug in the worker: " + bug, bug));
        }
    }

    // How it begins and ends.

    void start() {
        post(() -> {
            if (isStopping) {
                end();
            } else {
                connect();
            }
        });
    }

    void stop() {
        post(this::beginStop);
    }

    private void beginStop() {
        if (isStopping) {
            return;
        }
        isStopping = true;
        waiting.clear();
        held.values().stream().filter(delivery -> !delivery.isSettled && delivery.withdraw()).forEach(this::putBack);
        for (var line : new Line[] {current, opening}) {
            if (line != null) {
                sayStop(line);
            }
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
                current.halfClose();
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

    void release() {
        List.copyOf(lines).forEach(line -> line.cancel("the worker has ended"));
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
        opening = new Line(this);
        lines.add(opening);
        DataQueueGrpc.newStub(channel).withExecutor(loop).consume(opening);
        opening.say(ConsumeRequest.newBuilder().setOpen(open).build());
        if (isStopping) {
            sayStop(opening);
        } else {
            // Its first message tells that it is open and what it took over, and must come soon.
            opening.sayFence(open.getQueues(0).getName());
        }
        var line = opening;
        schedule(OPEN_WITHIN, () -> {
            if (line == opening) {
                Channels.leave(channel);
                line.cancel("the stream did not open in time");
            }
        });
    }

    private void sayStop(Line line) {
        line.say(ConsumeRequest.newBuilder().setMaxOutstanding(0).build());
        // Its answer comes behind the tasks that are on their way: these are put back before the stream is closed.
        line.sayFence(open.getQueues(0).getName());
    }

    void receive(Line line, ConsumeResponse message) {
        if (line == opening) {
            current = opening;
            opening = null;
            post(this::flush);
        }
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
                .forEach(delivery -> revoke(delivery, Cancellation.DELETED));
        if (message.getTasksCount() > 0 || message.getAnswersCount() > 0) {
            backoff.reset();
            wasTakenOver = false;
        }
        if (message.getDrain() && line == current && opening == null && !isPausing && !isFinishing) {
            LOG.log(Level.DEBUG, "the server drains its stream");
            Channels.leave(channel);
            again(line.isYoung() ? backoff.after(Line.ended()) : Duration.ZERO);
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
            if (!tokens.contains(token)) {
                revoke(delivery, Cancellation.LEASE_LOST);
            }
        });
    }

    /** Cancels the handler of a task, or spares it the task. */
    private void revoke(Delivery delivery, Cancellation why) {
        if (delivery.isSettled) {
            return;
        }
        if (delivery.withdraw()) {
            putBack(delivery);
        } else {
            delivery.cancel(why);
        }
    }

    void broken(Line line, DataQueueException error) {
        lines.remove(line);
        for (var sent : line.sent) {
            if (sent.wish().kind() != Wish.Kind.FENCE) {
                // What was said and not answered is said again: an ack that was applied answers ALREADY_ACKED.
                sent.tokens().forEach(token -> ask(sent.wish(), token));
            }
        }
        line.sent.clear();
        if (failure != null) {
            return;
        }
        var isReplaced = line != opening && (line != current || opening != null || isPausing);
        opening = line == opening ? null : opening;
        current = line == current ? null : current;
        if (isFinishing && current == null) {
            end();
        } else if (isReplaced) {
            finishIfDone();
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
        if (pause.isZero()) {
            connect();
        } else {
            isPausing = true;
            schedule(pause, () -> {
                isPausing = false;
                if (failure == null && !isFinishing) {
                    connect();
                }
            });
        }
    }

    private boolean canBeWaitedOut(DataQueueException error) {
        // The session is this worker's alone: it was a stream of its own that was thought dead and came late. Once.
        var isTakenOver = error.reason().filter("SESSION_TAKEN_OVER"::equals).isPresent();
        var helps = isTakenOver && !wasTakenOver;
        wasTakenOver |= isTakenOver;
        return helps || error.mayPass() || error.code() == Status.Code.INTERNAL;
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
            waiting.removeIf(other -> other.isSettled);
            waiting.add(delivery);
            handOut();
            // More than that wait only if the server takes some that run for lost; the oldest may be lost too.
            if (waiting.size() > concurrency) {
                revoke(waiting.remove(), Cancellation.LEASE_LOST);
            }
        }
    }

    private void handOut() {
        while (running < concurrency && !waiting.isEmpty()) {
            var delivery = waiting.remove();
            if (!delivery.isSettled) {
                try {
                    handlers.execute(() -> work(delivery));
                    running++;
                } catch (RejectedExecutionException | OutOfMemoryError full) {
                    // The latter is also how a thread that cannot be made is told.
                    fail(new DataQueueException(Status.Code.INTERNAL, "the executor takes no handler", full));
                }
            }
        }
    }

    /** What a handler's thread does. */
    private void work(Delivery delivery) {
        Throwable thrown = null;
        if (delivery.begin()) {
            var timer = deadline == null ? null : schedule(deadline, () -> delivery.cancel(Cancellation.DEADLINE));
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
        if (cancellation == Cancellation.DEADLINE) {
            var seconds = BigDecimal.valueOf(deadline.toMillis(), 3).stripTrailingZeros().toPlainString();
            fail(delivery, "deadline of " + seconds + " s passed");
        } else if (thrown == null) {
            settle(delivery, Wish.Kind.ACK, "");
        } else if (thrown instanceof Reject) {
            settle(delivery, Wish.Kind.REJECT, reason(thrown));
        } else if (cancellation != null) {
            putBack(delivery);
        } else {
            LOG.log(Level.WARNING, () -> "task " + delivery.task.getId() + " failed", thrown);
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
        var bytes = text(error).getBytes(StandardCharsets.UTF_8);
        var length = Math.min(bytes.length, MAX_REASON_BYTES);
        while (length < bytes.length && length > 0 && (bytes[length] & 0xC0) == 0x80) {
            length--;
        }
        return new String(bytes, 0, length, StandardCharsets.UTF_8);
    }

    private static String text(Throwable error) {
        try {
            var message = error.getMessage();
            return message == null || message.isEmpty() ? error.toString() : message;
        } catch (RuntimeException worse) {
            return error.getClass().getName();
        }
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
    void flush() {
        isFlushDue = false;
        if (current == null || isFinishing || !current.isReady()) {
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
        if (sent == null || answer.getOutcomesCount() != sent.tokens().size()) {
            throw new IllegalStateException("the server answered what it was not asked");
        }
        for (var at = 0; at < sent.tokens().size(); at++) {
            var delivery = held.remove(sent.tokens().get(at));
            if (delivery != null && sent.wish().kind() == Wish.Kind.ACK) {
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
        } catch (RuntimeException | Error error) {
            LOG.log(Level.WARNING, "the worker's listener failed", error);
        }
    }
}
