package dataqueue.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dataqueue.v1.InsertRequest;
import dataqueue.v1.InsertResult;
import dataqueue.v1.QueueSettings;
import dataqueue.v1.UpdateQueueRequest;
import io.grpc.Status;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashSet;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

@Timeout(value = 90, threadMode = Timeout.ThreadMode.SEPARATE_THREAD)
class ProducerTest {
    private static final String QUEUE = "made";

    private TestServer server;
    private Producer producer;

    @BeforeEach
    void start() throws Exception {
        server = new TestServer();
        producer = Producer.builder().address(server.address()).build();
    }

    @AfterEach
    void stop() throws Exception {
        producer.close();
        server.close();
    }

    private static DataQueueException refusal(CompletableFuture<?> future) {
        var error = assertThrows(ExecutionException.class, future::get);
        return assertInstanceOf(DataQueueException.class, error.getCause());
    }

    @Test
    void insertsOverARestartAreMadeOnce() throws Exception {
        var answers = new ArrayList<CompletableFuture<?>>();
        for (var n = 0; n < 300; n++) {
            if (n % 100 == 50) {
                server.kill();
            }
            if (n % 100 == 70) {
                server.start();
            }
            answers.add(producer.insert(QUEUE, Program.json(Integer.toString(n))));
        }
        for (var answer : answers) {
            answer.get();
        }
        assertEquals(300, server.counts(QUEUE).getInserted());
    }

    @Test
    void aRepeatedRequestIdGivesTheFirstAnswer() throws Exception {
        var request = InsertRequest.newBuilder()
                .setQueue(QUEUE)
                .setRequestId("mine")
                .addTasks(Program.json("1"))
                .build();
        var first = producer.insert(request).get();
        server.restart();
        var second = producer.insert(request).get();
        assertEquals(first.getResultsList(), second.getResultsList());
        assertTrue(second.getReplayed());
        assertEquals(1, server.counts(QUEUE).getInserted());
    }

    @Test
    void aRefusalNamesItsReasonAndField() {
        var error = refusal(producer.insert(QUEUE, Program.json("{}"), Program.json("{")));
        assertEquals(Status.Code.INVALID_ARGUMENT, error.code());
        assertEquals("JSON_INVALID", error.reason().orElseThrow());
        assertEquals("tasks[1].json", error.field().orElseThrow());
        assertTrue(error.getMessage().startsWith("INVALID_ARGUMENT JSON_INVALID at tasks[1].json: "), error.getMessage());
    }

    @Test
    void aFullQueueIsWaitedForUntilTheTimeout() throws Exception {
        setMaxTasks(0);
        try (var hasty = Producer.builder().address(server.address()).timeout(Duration.ofMillis(700)).build()) {
            var error = refusal(hasty.insert(QUEUE, Program.json("1")));
            assertEquals(Status.Code.DEADLINE_EXCEEDED, error.code());
            assertTrue(error.getMessage().contains("QUEUE_FULL"), error.getMessage());
        }
        var patient = producer.insert(QUEUE, Program.json("1"));
        setMaxTasks(10);
        patient.get();
        assertEquals(1, server.counts(QUEUE).getInserted());
    }

    private void setMaxTasks(long tasks) {
        server.admin()
                .updateQueue(UpdateQueueRequest.newBuilder()
                        .setQueue(QUEUE)
                        .setSettings(QueueSettings.newBuilder().setMaxTasks(tasks))
                        .setUpdateMask(com.google.protobuf.FieldMask.newBuilder().addPaths("max_tasks"))
                        .build());
    }

    @Test
    void aBatchTellsEachTasksIdOverARestart() throws Exception {
        var results = new ArrayList<CompletableFuture<InsertResult>>();
        try (var batch = producer.batch(QUEUE)) {
            for (var n = 0; n < 10_000; n++) {
                if (n == 5_000) {
                    server.restart();
                }
                results.add(batch.add(Program.json(Integer.toString(n))));
            }
            batch.flush();
            assertTrue(results.stream().allMatch(CompletableFuture::isDone));
        }
        var ids = new HashSet<String>();
        for (var result : results) {
            ids.add(result.get().getId());
        }
        assertEquals(10_000, ids.size());
        assertEquals(10_000, server.counts(QUEUE).getInserted());
    }

    @Test
    void aBatchGoesByItselfAndTakesLargeTasks() throws Exception {
        try (var batch = producer.batch(QUEUE)) {
            batch.add(Program.json("1")).get();
            var large = Program.json("\"" + "x".repeat((1 << 20) - 2) + "\"");
            var results = new ArrayList<CompletableFuture<InsertResult>>();
            for (var n = 0; n < 10; n++) {
                results.add(batch.add(large));
            }
            batch.flush();
            for (var result : results) {
                result.get();
            }
            var refused = batch.add(Program.json("{"));
            assertEquals("JSON_INVALID", refusal(refused).reason().orElseThrow());
        }
        assertEquals(11, server.counts(QUEUE).getInserted());
    }
}
