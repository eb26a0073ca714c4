package dataqueue.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.ByteString;
import dataqueue.client.Context.Cancellation;
import dataqueue.v1.InsertRequest;
import dataqueue.v1.PopRequest;
import dataqueue.v1.Task;
import dataqueue.v1.TaskState;
import io.grpc.Status;
import java.net.ServerSocket;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.List;
import java.util.Queue;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.FutureTask;
import java.util.concurrent.Semaphore;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicReference;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

@Timeout(value = 90, threadMode = Timeout.ThreadMode.SEPARATE_THREAD)
class WorkerTest {
    private static final String QUEUE = "work";
    private static final com.google.protobuf.Duration AN_HOUR = TestServer.millis(3_600_000);

    private TestServer server;

    @BeforeEach
    void startServer() throws Exception {
        server = new TestServer();
    }

    @AfterEach
    void stopServer() throws Exception {
        server.close();
    }

    /** A worker on a thread of its own, and what its listener was told. */
    private static final class Running implements AutoCloseable {
        private final Queue<String> acked = new ConcurrentLinkedQueue<>();
        private final Queue<String> lost = new ConcurrentLinkedQueue<>();
        private final AtomicInteger breaks = new AtomicInteger();
        private final Worker worker;
        private final FutureTask<Void> run;

        private Running(Worker.Builder builder) {
            worker = builder.listener(new Worker.Listener() {
                        @Override
                        public void acked(Task task) {
                            acked.add(task.getJson());
                        }

                        @Override
                        public void lost(Task task) {
                            lost.add(task.getJson());
                        }

                        @Override
                        public void disconnected(DataQueueException error, Duration pause) {
                            breaks.incrementAndGet();
                        }
                    })
                    .build();
            run = new FutureTask<>(worker, null);
            new Thread(run, "worker").start();
        }

        @Override
        public void close() {
            worker.close();
        }
    }

    private Worker.Builder worker(Handler handler) {
        return Worker.builder(handler).address(server.address()).queue(QUEUE);
    }

    /** Inserts numbers; answers their ids. */
    private List<String> insert(int count) {
        var request = InsertRequest.newBuilder().setQueue(QUEUE);
        for (var n = 0; n < count; n++) {
            request.addTasks(Program.json(Integer.toString(n)));
        }
        return server.queues().insert(request.build()).getResultsList().stream().map(result -> result.getId()).toList();
    }

    private String lastError(TaskState state) throws InterruptedException {
        TestServer.until("a task is " + state, () -> !server.tasks(QUEUE, state).isEmpty());
        return server.tasks(QUEUE, state).get(0).getLastError();
    }

    @Test
    void whatReturnsIsAckedWhatThrowsComesAgainWhatIsRejectedIsDead() throws Exception {
        server.setBackoff(QUEUE, TestServer.millis(0));
        insert(3);
        var failures = new ConcurrentLinkedQueue<Integer>();
        Handler handler = (task, context) -> {
            if (task.getJson().equals("1")) {
                failures.add(task.getFailures());
                if (task.getFailures() == 0) {
                    throw new IllegalStateException("once");
                }
            }
            if (task.getJson().equals("2")) {
                throw new Reject("not wanted");
            }
        };
        try (var running = new Running(worker(handler))) {
            assertEquals("not wanted", lastError(TaskState.TASK_STATE_DEAD));
            TestServer.until("two are acked", () -> running.acked.size() == 2);
            assertEquals(Set.of("0", "1"), Set.copyOf(running.acked));
            assertEquals(List.of(0, 1), List.copyOf(failures));
            running.worker.stop();
            running.run.get();
        }
        var counts = server.counts(QUEUE);
        assertEquals(List.of(2L, 1L, 0L), List.of(counts.getAcked(), counts.getDead(), counts.getLeased()));
    }

    @Test
    void aReasonIsCutAt1024BytesAndNotWithinACharacter() throws Exception {
        server.setBackoff(QUEUE, AN_HOUR);
        insert(1);
        Handler handler = (task, context) -> {
            throw new IllegalStateException("x" + "\u00e9".repeat(1_000));
        };
        try (var running = new Running(worker(handler))) {
            var reason = lastError(TaskState.TASK_STATE_SCHEDULED);
            assertEquals("x" + "\u00e9".repeat(511), reason);
            assertEquals(1_023, reason.getBytes(StandardCharsets.UTF_8).length);
            assertFalse(running.run.isDone());
        }
        assertEquals("\ud83d\ude00".repeat(256), Session.reason(new Exception("\ud83d\ude00".repeat(300))));
        assertEquals("java.lang.Exception", Session.reason(new Exception()));
        var mute = new Exception() {
            private static final long serialVersionUID = 1;

            @Override
            public String getMessage() {
                throw new IllegalStateException("there is none");
            }
        };
        assertEquals(mute.getClass().getName(), Session.reason(mute));
    }

    @Test
    void aDamagedValueIsNoticed() {
        var sent = Task.newBuilder().setData(ByteString.copyFromUtf8("ab")).setMd5("187ef4436122d1cc2f40dc2b92f0eba0");
        assertTrue(new Delivery(sent.build()).damage().isEmpty());
        var damaged = new Delivery(sent.setJson("ac").build()).damage().orElseThrow();
        assertTrue(damaged.contains("187ef4436122d1cc2f40dc2b92f0eba0"), damaged);
    }

    @Test
    void aHandlerPastItsDeadlineIsInterruptedAndFails() throws Exception {
        server.setBackoff(QUEUE, AN_HOUR);
        insert(1);
        var cancellation = new AtomicReference<Cancellation>();
        Handler handler = (task, context) -> {
            try {
                new CountDownLatch(1).await();
            } catch (InterruptedException interrupt) {
                // It returns as if it were done, and is not acked all the same.
                cancellation.set(context.cancellation().orElse(null));
            }
        };
        try (var running = new Running(worker(handler).deadline(Duration.ofMillis(150)))) {
            assertEquals("deadline of 0.15 s passed", lastError(TaskState.TASK_STATE_SCHEDULED));
            assertTrue(running.acked.isEmpty());
        }
        assertEquals(Cancellation.DEADLINE, cancellation.get());
        assertEquals(0, server.counts(QUEUE).getAcked());
    }

    @Test
    void aTaskThatIsDeletedWhileItIsHeldCancelsItsHandler() throws Exception {
        var ids = insert(1);
        var begun = new CountDownLatch(1);
        var cancellation = new AtomicReference<Cancellation>();
        Handler handler = (task, context) -> {
            begun.countDown();
            try {
                new CountDownLatch(1).await();
            } finally {
                cancellation.set(context.cancellation().orElse(null));
            }
        };
        try (var running = new Running(worker(handler).lease(Duration.ofMillis(600)))) {
            begun.await();
            server.delete(QUEUE, ids.get(0));
            TestServer.until("it is deleted", () -> server.counts(QUEUE).getDeleted() == 1);
            assertFalse(running.run.isDone());
        }
        assertEquals(Cancellation.DELETED, cancellation.get());
    }

    @Test
    void nothingIsLostOrAckedUnfinishedWhenTheServerIsKilled() throws Exception {
        insert(200);
        var finished = ConcurrentHashMap.<String>newKeySet();
        var turns = new Semaphore(50);
        Handler handler = (task, context) -> {
            turns.acquire();
            finished.add(task.getJson());
        };
        try (var running = new Running(worker(handler).concurrency(8).lease(Duration.ofSeconds(2)))) {
            for (var round = 1; round <= 3; round++) {
                var share = 50 * round - 8;
                TestServer.until(share + " are acked", () -> running.acked.size() >= share);
                server.kill();
                var breaks = round;
                TestServer.until("the worker knows", () -> running.breaks.get() >= breaks);
                // These finish while there is no server.
                turns.release(50);
                server.start();
            }
            turns.release(1_000);
            TestServer.until("all are gone", () -> server.counts(QUEUE).getAcked() == 200);
            TestServer.until("all are known", () -> Set.copyOf(running.acked).size() == 200);
            assertTrue(finished.containsAll(running.acked));
        }
        var counts = server.counts(QUEUE);
        assertEquals(List.of(200L, 0L, 0L), List.of(counts.getInserted(), counts.getLeased(), counts.getReady()));
    }

    @Test
    void whatFinishedBesideABrokenStreamIsAckedOnTheNext() throws Exception {
        insert(1);
        var begun = new CountDownLatch(1);
        var end = new CountDownLatch(1);
        var deliveries = new AtomicInteger();
        Handler handler = (task, context) -> {
            deliveries.incrementAndGet();
            begun.countDown();
            end.await();
        };
        try (var running = new Running(worker(handler))) {
            begun.await();
            server.kill();
            TestServer.until("the worker knows", () -> running.breaks.get() > 0);
            end.countDown();
            server.start();
            TestServer.until("it is acked", () -> running.acked.size() == 1);
        }
        assertEquals(1, deliveries.get());
        assertEquals(1, server.counts(QUEUE).getAcked());
    }

    @Test
    void aHandlerGoesOnOverARestartWhoseStreamTookItsTaskOver() throws Exception {
        insert(1);
        var begun = new CountDownLatch(1);
        var end = new CountDownLatch(1);
        var deliveries = new AtomicInteger();
        Handler handler = (task, context) -> {
            deliveries.incrementAndGet();
            if (!task.getJson().equals("\"later\"")) {
                begun.countDown();
                end.await();
            }
        };
        try (var running = new Running(worker(handler))) {
            begun.await();
            server.restart();
            // The stream that brings another task has told before what it took over.
            server.queues().insert(InsertRequest.newBuilder().setQueue(QUEUE).addTasks(Program.json("\"later\"")).build());
            TestServer.until("the other is acked", () -> running.acked.contains("\"later\""));
            end.countDown();
            TestServer.until("both are acked", () -> running.acked.size() == 2);
        }
    }

    @Test
    void aStreamThatDrainsIsReplacedWhileItsTasksAreHeld() throws Exception {
        server.close();
        server = new TestServer("--max-stream-age", "1s");
        insert(1);
        var begun = new CountDownLatch(1);
        var end = new CountDownLatch(1);
        Handler handler = (task, context) -> {
            if (begun.getCount() > 0) {
                begun.countDown();
                end.await();
            }
        };
        try (var running = new Running(worker(handler).lease(Duration.ofSeconds(1)))) {
            begun.await();
            // Streams live for about a second: what is inserted for three of them comes, and the held task stays.
            var count = 0;
            for (var limit = System.nanoTime() + TimeUnit.SECONDS.toNanos(3); System.nanoTime() < limit; count++) {
                insert(1);
                var due = count + 1;
                TestServer.until("it is acked", () -> running.acked.size() == due);
            }
            end.countDown();
            var due = count + 1;
            TestServer.until("the held one too", () -> running.acked.size() == due);
            assertEquals(0, running.breaks.get());
            running.worker.stop();
            running.run.get();
        }
        assertEquals(0, server.counts(QUEUE).getLeased());
    }

    @Test
    void aWorkerMayStartBeforeItsServer() throws Exception {
        insert(1);
        server.kill();
        try (var running = new Running(worker((task, context) -> {}))) {
            TestServer.until("it has tried", () -> running.breaks.get() > 1);
            server.start();
            TestServer.until("it is acked", () -> running.acked.size() == 1);
        }
    }

    @Test
    void aWorkerStopsWhileThereIsNoServer() throws Exception {
        int port;
        try (var socket = new ServerSocket(0)) {
            port = socket.getLocalPort();
        }
        var running = new Running(
                Worker.builder((task, context) -> {}).address("127.0.0.1:" + port).queue(QUEUE));
        TestServer.until("it has tried", () -> running.breaks.get() > 0);
        running.close();
        running.run.get();
    }

    @Test
    void aStopLetsHandlersFinishAndGivesBackTheRest() throws Exception {
        insert(6);
        var begun = new CountDownLatch(2);
        var end = new CountDownLatch(1);
        Handler handler = (task, context) -> {
            begun.countDown();
            end.await();
        };
        // Only two of the four that are delivered begin: the executor has no more threads.
        var executor = java.util.concurrent.Executors.newFixedThreadPool(2);
        try (var running = new Running(worker(handler).concurrency(4).executor(executor))) {
            begun.await();
            TestServer.until("four are delivered", () -> server.counts(QUEUE).getLeased() == 4);
            running.worker.stop();
            TestServer.until("those not begun are back", () -> server.counts(QUEUE).getReady() == 4);
            assertFalse(running.run.isDone());
            end.countDown();
            running.run.get();
            assertEquals(2, running.acked.size());
        } finally {
            executor.shutdownNow();
        }
        var counts = server.counts(QUEUE);
        assertEquals(List.of(2L, 4L, 0L), List.of(counts.getAcked(), counts.getReady(), counts.getLeased()));
        var back = server.queues().pop(PopRequest.newBuilder().setQueue(QUEUE).build()).getTask();
        assertEquals(List.of(0, 0), List.of(back.getFailures(), back.getExpiries()));
    }

    @Test
    void whatStillRunsAfterTheGraceIsCancelledAndGoesBackPlainly() throws Exception {
        insert(1);
        var begun = new CountDownLatch(1);
        var cancelled = new CountDownLatch(1);
        Handler handler = (task, context) -> {
            begun.countDown();
            try {
                new CountDownLatch(1).await();
            } catch (InterruptedException interrupt) {
                if (context.cancellation().orElse(null) == Cancellation.STOPPED) {
                    cancelled.countDown();
                }
            }
        };
        try (var running = new Running(worker(handler).grace(Duration.ofMillis(100)))) {
            begun.await();
            running.worker.stop();
            running.run.get();
            assertTrue(cancelled.await(10, TimeUnit.SECONDS));
        }
        var back = server.queues().pop(PopRequest.newBuilder().setQueue(QUEUE).build()).getTask();
        assertEquals(List.of(2, 0, 0), List.of(back.getDeliveries(), back.getFailures(), back.getExpiries()));
        assertEquals(0, server.counts(QUEUE).getAcked());
    }

    @Test
    void anInterruptStopsAWorker() throws Exception {
        insert(1);
        var acked = new CountDownLatch(1);
        var worker = worker((task, context) -> {})
                .listener(new Worker.Listener() {
                    @Override
                    public void acked(Task task) {
                        acked.countDown();
                    }
                })
                .build();
        var isInterrupted = new FutureTask<>(() -> {
            worker.run();
            return Thread.interrupted();
        });
        var thread = new Thread(isInterrupted);
        thread.start();
        acked.await();
        thread.interrupt();
        assertTrue(isInterrupted.get());
    }

    @Test
    void whatTheServerRefusesEndsTheRunWithReasonAndField() throws Exception {
        var running = new Running(worker((task, context) -> {}).queue("not a name"));
        var end = assertThrows(ExecutionException.class, running.run::get);
        var error = (DataQueueException) end.getCause();
        assertEquals(Status.Code.INVALID_ARGUMENT, error.code());
        assertEquals("QUEUE_NAME_INVALID", error.reason().orElseThrow());
        var field = error.field().orElseThrow();
        assertTrue(error.getMessage().startsWith("INVALID_ARGUMENT QUEUE_NAME_INVALID at " + field + ": "), error.getMessage());
    }

    @Test
    void anAckAfterTheLeaseWasTakenBackIsCountedAsLost() throws Exception {
        insert(1);
        var deliveries = new AtomicInteger();
        var begun = new CountDownLatch(1);
        var end = new CountDownLatch(1);
        Handler handler = (task, context) -> {
            if (deliveries.incrementAndGet() == 1) {
                begun.countDown();
                end.await();
            }
        };
        try (var running = new Running(worker(handler).concurrency(2))) {
            begun.await();
            server.queues()
                    .putback(dataqueue.v1.PutbackRequest.newBuilder()
                            .setQueue(QUEUE)
                            .setHeldFor(TestServer.millis(0))
                            .build());
            TestServer.until("it is acked by its second delivery", () -> running.acked.size() == 1);
            end.countDown();
            TestServer.until("the first ack is lost", () -> running.lost.size() == 1);
            assertEquals(1, running.worker.lostAcks());
        }
    }
}
