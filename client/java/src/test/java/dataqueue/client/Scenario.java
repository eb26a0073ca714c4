package dataqueue.client;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import com.google.protobuf.ByteString;
import dataqueue.v1.AckRequest;
import dataqueue.v1.DataQueueGrpc;
import dataqueue.v1.DataQueueGrpc.DataQueueBlockingStub;
import dataqueue.v1.GetQueueRequest;
import dataqueue.v1.HeartbeatRequest;
import dataqueue.v1.InsertRequest;
import dataqueue.v1.ListTasksRequest;
import dataqueue.v1.NewTask;
import dataqueue.v1.Outcome;
import dataqueue.v1.PopBatchRequest;
import dataqueue.v1.PopRequest;
import dataqueue.v1.PutbackRequest;
import dataqueue.v1.PutbackTokens;
import dataqueue.v1.QueueAdminGrpc;
import dataqueue.v1.QueueAdminGrpc.QueueAdminBlockingStub;
import dataqueue.v1.QueueCounts;
import dataqueue.v1.Task;
import dataqueue.v1.TaskState;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Base64;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.FutureTask;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.concurrent.atomic.AtomicInteger;

/** The steps of a scenario's file, which says what they mean. */
final class Scenario {
    private static final Duration PATIENCE = Duration.ofSeconds(10);
    /** The time for the steps in which a worker runs, server restarts included. */
    private static final Duration LONG_PATIENCE = Duration.ofSeconds(120);
    private static final long CALL_SECONDS = 30;

    /** What is known of a task with a name. */
    private static final class Named {
        private NewTask task;
        private String id;
        private String token;
        private String stale;
    }

    /** A step came to something else than is expected. */
    private static final class Mismatch extends RuntimeException {
        private static final long serialVersionUID = 1;

        private Mismatch(String what, Object expected, Object got) {
            super(what + ": expected " + expected + ", got " + got);
        }
    }

    private final String address;
    private final String prefix;
    private final io.grpc.ManagedChannel channel;
    private final Map<String, Named> names = new HashMap<>();

    Scenario(String address, String prefix) {
        this.address = address;
        this.prefix = prefix;
        channel = Channels.open(address);
    }

    boolean run(Path file) throws Exception {
        try {
            var number = 0;
            for (var element : JsonParser.parseString(Files.readString(file)).getAsJsonObject().getAsJsonArray("steps")) {
                var step = element.getAsJsonObject();
                var title = ++number + " " + text(step, "do") + " " + text(step, "queue");
                try {
                    run(step);
                    Program.say("ok " + title);
                } catch (Mismatch | DataQueueException error) {
                    Program.say("failed " + title + ": " + error.getMessage());
                    return false;
                }
            }
            return true;
        } finally {
            channel.shutdownNow();
        }
    }

    private void run(JsonObject step) throws Exception {
        var queue = prefix + "-" + text(step, "queue");
        var expect = step.getAsJsonObject("expect");
        try {
            switch (text(step, "do")) {
                case "insert" -> insert(queue, step, expect);
                case "pop" -> pop(queue, step, expect);
                case "pop_batch" -> popBatch(queue, step, expect);
                case "heartbeat" -> outcomes(expect, queues()
                        .heartbeat(HeartbeatRequest.newBuilder()
                                .setQueue(queue)
                                .addAllLeaseTokens(tokens(step))
                                .setLease(millis(step, "lease"))
                                .build())
                        .getOutcomesList());
                case "ack" -> outcomes(expect, queues()
                        .ack(AckRequest.newBuilder().setQueue(queue).addAllLeaseTokens(tokens(step)).build())
                        .getOutcomesList());
                case "putback" -> putback(queue, step, expect);
                case "counts" -> counts(queue, expect);
                case "dead" -> dead(queue, expect);
                case "consume" -> consume(queue, step, expect);
                case "reconnect" -> reconnect(queue, step, expect);
                default -> throw new Mismatch("do", "a known step", text(step, "do"));
            }
        } catch (io.grpc.StatusRuntimeException status) {
            refused(expect, DataQueueException.of(status));
            return;
        }
        if (expect.has("error")) {
            throw new Mismatch("answer", expect.get("error"), "OK");
        }
    }

    private static void refused(JsonObject expect, DataQueueException error) {
        if (!expect.has("error")) {
            throw error;
        }
        var expected = expect.getAsJsonObject("error");
        same("code", text(expected, "code"), error.code().name());
        same("reason", text(expected, "reason"), error.reason().orElse(""));
        if (expected.has("field")) {
            same("field", text(expected, "field"), error.field().orElse(""));
        }
    }

    // The single calls.

    private void insert(String queue, JsonObject step, JsonObject expect) {
        var request = InsertRequest.newBuilder().setQueue(queue);
        if (step.has("request_id")) {
            request.setRequestId(text(step, "request_id"));
        }
        step.getAsJsonArray("tasks").forEach(task -> request.addTasks(newTask(task.getAsJsonObject())));
        var answer = queues().insert(request.build());
        var given = texts(step, "names");
        for (var at = 0; at < given.size(); at++) {
            var named = names.computeIfAbsent(queue + " " + given.get(at), any -> new Named());
            var id = answer.getResults(at).getId();
            same("id of " + given.get(at), named.id == null ? id : named.id, id);
            named.id = id;
            named.task = request.getTasks(at);
        }
        if (expect.has("replayed")) {
            same("replayed", expect.get("replayed").getAsBoolean(), answer.getReplayed());
        }
    }

    private static NewTask newTask(JsonObject given) {
        var task = NewTask.newBuilder();
        if (given.has("json")) {
            task.setJson(text(given, "json"));
        } else {
            task.setData(ByteString.copyFrom(Base64.getDecoder().decode(text(given, "data"))));
        }
        if (given.has("headers")) {
            given.getAsJsonObject("headers").asMap().forEach((name, value) -> task.putHeaders(name, value.getAsString()));
        }
        return task.build();
    }

    private void pop(String queue, JsonObject step, JsonObject expect) {
        var request = PopRequest.newBuilder().setQueue(queue);
        if (step.has("lease")) {
            request.setLease(millis(step, "lease"));
        }
        if (step.has("wait")) {
            request.setWait(millis(step, "wait"));
        }
        var answer = queues().pop(request.build());
        popped(queue, answer.hasTask() ? List.of(answer.getTask()) : List.of(), expect);
    }

    private void popBatch(String queue, JsonObject step, JsonObject expect) {
        var request = PopBatchRequest.newBuilder()
                .setQueue(queue)
                .setMaxTasks(step.get("max_tasks").getAsInt())
                .setLease(millis(step, "lease"))
                .build();
        var tasks = new ArrayList<Task>();
        queues().popBatch(request).forEachRemaining(part -> tasks.addAll(part.getTasksList()));
        popped(queue, tasks, expect);
    }

    private void popped(String queue, List<Task> tasks, JsonObject expect) {
        var expected = texts(expect, "tasks");
        same("number of tasks", expected.size(), tasks.size());
        for (var at = 0; at < expected.size(); at++) {
            var name = expected.get(at);
            var named = named(queue, name);
            var task = tasks.get(at);
            same("id of " + name, named.id, task.getId());
            same("json of " + name, named.task.getJson(), task.getJson());
            same("data of " + name, named.task.getData(), task.getData());
            same("headers of " + name, named.task.getHeadersMap(), task.getHeadersMap());
            if (expect.has("deliveries")) {
                same("deliveries of " + name, expect.getAsJsonArray("deliveries").get(at).getAsInt(), task.getDeliveries());
            }
            named.stale = named.token;
            named.token = task.getLeaseToken();
        }
    }

    private void putback(String queue, JsonObject step, JsonObject expect) {
        var tokens = PutbackTokens.newBuilder().addAllLeaseTokens(tokens(step));
        if (step.has("delay")) {
            tokens.setDelay(millis(step, "delay"));
        }
        if (step.has("reason")) {
            tokens.setReason(text(step, "reason"));
        }
        tokens.setFailed(step.has("failed") && step.get("failed").getAsBoolean());
        tokens.setDeadLetter(step.has("dead_letter") && step.get("dead_letter").getAsBoolean());
        var answer = queues().putback(PutbackRequest.newBuilder().setQueue(queue).setTokens(tokens).build());
        outcomes(expect, answer.getOutcomesList());
    }

    private void counts(String queue, JsonObject expect) throws InterruptedException {
        var until = System.nanoTime() + PATIENCE.toNanos();
        while (true) {
            var counts = admin().getQueue(GetQueueRequest.newBuilder().setQueue(queue).build()).getQueue().getCounts();
            var wrong = expect.asMap().entrySet().stream()
                    .filter(entry -> !entry.getValue().getAsBigInteger().equals(count(counts, entry.getKey())))
                    .findFirst();
            if (wrong.isEmpty()) {
                return;
            }
            if (System.nanoTime() > until) {
                var name = wrong.get().getKey();
                throw new Mismatch(name, wrong.get().getValue(), count(counts, name));
            }
            TimeUnit.MILLISECONDS.sleep(20);
        }
    }

    private static java.math.BigInteger count(QueueCounts counts, String name) {
        var field = QueueCounts.getDescriptor().findFieldByName(name);
        return java.math.BigInteger.valueOf((Long) counts.getField(field));
    }

    private void dead(String queue, JsonObject expect) {
        var request = ListTasksRequest.newBuilder().setQueue(queue).setState(TaskState.TASK_STATE_DEAD).build();
        var tasks = admin().listTasks(request).getTasksList();
        same("ids",
                texts(expect, "tasks").stream().map(name -> named(queue, name).id).toList(),
                tasks.stream().map(info -> info.getTask().getId()).toList());
        same("reasons", texts(expect, "reasons"), tasks.stream().map(info -> info.getLastError()).toList());
    }

    // The steps with a worker.

    private void consume(String queue, JsonObject step, JsonObject expect) throws Exception {
        var count = step.get("count").getAsInt();
        var concurrency = step.get("concurrency").getAsInt();
        var fails = numbers(step, "fail");
        var rejects = numbers(step, "reject");
        try (var producer = Producer.builder().address(address).build(); var batch = producer.batch(queue)) {
            for (var n = 0; n < count; n++) {
                batch.add(Program.json("{\"n\": " + n + "}"));
            }
        }
        var handled = new AtomicInteger();
        var failed = new AtomicInteger();
        var rejected = new AtomicInteger();
        var running = new AtomicInteger();
        var most = new AtomicInteger();
        var isWrong = new AtomicBoolean();
        var left = new CountDownLatch(count);
        var overlap = new CountDownLatch(Math.min(2, Math.min(count, concurrency)));
        Handler handler = (task, context) -> {
            most.accumulateAndGet(running.incrementAndGet(), Math::max);
            try {
                // The first ones wait for each other: handlers that do not overlap would not get on.
                overlap.countDown();
                if (!overlap.await(PATIENCE.toSeconds(), TimeUnit.SECONDS)) {
                    isWrong.set(true);
                }
                var n = n(task);
                if (rejects.contains(n)) {
                    rejected.incrementAndGet();
                    left.countDown();
                    throw new Reject("not wanted");
                }
                if (fails.contains(n) && task.getFailures() == 0) {
                    failed.incrementAndGet();
                    throw new IllegalStateException("fails once");
                }
                if (fails.contains(n) && task.getFailures() != 1) {
                    isWrong.set(true);
                }
                handled.incrementAndGet();
                left.countDown();
            } finally {
                running.decrementAndGet();
            }
        };
        try (var running1 = new Running(Worker.builder(handler).address(address).queue(queue).concurrency(concurrency))) {
            running1.await(left);
        }
        same("handled", expect.get("handled").getAsInt(), handled.get());
        same("failed", expect.get("failed").getAsInt(), failed.get());
        same("rejected", expect.get("rejected").getAsInt(), rejected.get());
        same("overlapping, and one failure at the second delivery", true, !isWrong.get());
        same("at most " + concurrency + " at once", true, most.get() <= concurrency);
    }

    private void reconnect(String queue, JsonObject step, JsonObject expect) throws Exception {
        var count = step.get("count").getAsInt();
        var restart = new CountDownLatch(step.get("restart_after").getAsInt());
        var isSaid = new AtomicBoolean();
        Set<Integer> acked = ConcurrentHashMap.newKeySet();
        var left = new CountDownLatch(count);
        Handler handler = (task, context) -> {
            restart.countDown();
            if (restart.getCount() == 0 && !isSaid.getAndSet(true)) {
                Program.say("restart");
            }
        };
        var builder = Worker.builder(handler)
                .address(address)
                .queue(queue)
                .concurrency(step.get("concurrency").getAsInt())
                .listener(new Worker.Listener() {
                    @Override
                    public void acked(Task task) {
                        if (acked.add(n(task))) {
                            left.countDown();
                        }
                    }
                });
        try (var worker = new Running(builder); var producer = Producer.builder().address(address).build()) {
            for (var n = 0; n < count; n++) {
                producer.insert(queue, Program.json("{\"n\": " + n + "}")).get();
            }
            worker.await(left);
        }
        same("handled", expect.get("handled").getAsInt(), acked.size());
    }

    /** A worker that runs on a thread of its own. */
    private static final class Running implements AutoCloseable {
        private final Worker worker;
        private final FutureTask<Void> run;

        private Running(Worker.Builder builder) {
            worker = builder.build();
            run = new FutureTask<>(worker, null);
            new Thread(run, "worker").start();
        }

        private void await(CountDownLatch left) throws InterruptedException {
            if (!left.await(LONG_PATIENCE.toSeconds(), TimeUnit.SECONDS)) {
                throw new Mismatch("tasks left", 0, left.getCount());
            }
        }

        @Override
        public void close() {
            worker.close();
        }
    }

    // What steps and answers have in them.

    private DataQueueBlockingStub queues() {
        return DataQueueGrpc.newBlockingStub(channel).withDeadlineAfter(CALL_SECONDS, TimeUnit.SECONDS);
    }

    private QueueAdminBlockingStub admin() {
        return QueueAdminGrpc.newBlockingStub(channel).withDeadlineAfter(CALL_SECONDS, TimeUnit.SECONDS);
    }

    private Named named(String queue, String name) {
        return Objects.requireNonNull(names.get(queue + " " + name), name);
    }

    private List<String> tokens(JsonObject step) {
        var queue = prefix + "-" + text(step, "queue");
        return step.has("stale")
                ? texts(step, "stale").stream().map(name -> named(queue, name).stale).toList()
                : texts(step, "tasks").stream().map(name -> named(queue, name).token).toList();
    }

    private static void outcomes(JsonObject expect, List<Outcome> outcomes) {
        var got = outcomes.stream().map(outcome -> outcome.name().replaceFirst("^OUTCOME_", "")).toList();
        same("outcomes", texts(expect, "outcomes"), got);
    }

    private static void same(String what, Object expected, Object got) {
        if (!expected.equals(got)) {
            throw new Mismatch(what, expected, got);
        }
    }

    private static int n(Task task) {
        return JsonParser.parseString(task.getJson()).getAsJsonObject().get("n").getAsInt();
    }

    private static String text(JsonObject object, String name) {
        return object.get(name).getAsString();
    }

    private static List<String> texts(JsonObject object, String name) {
        return array(object, name).asList().stream().map(JsonElement::getAsString).toList();
    }

    private static List<Integer> numbers(JsonObject object, String name) {
        return array(object, name).asList().stream().map(JsonElement::getAsInt).toList();
    }

    private static JsonArray array(JsonObject object, String name) {
        return object.has(name) ? object.getAsJsonArray(name) : new JsonArray();
    }

    private static com.google.protobuf.Duration millis(JsonObject step, String name) {
        return TestServer.millis(step.get(name).getAsLong());
    }
}
