package dataqueue.client;

import com.google.protobuf.Duration;
import dataqueue.v1.DataQueueGrpc;
import dataqueue.v1.DeleteTasksRequest;
import dataqueue.v1.GetQueueRequest;
import dataqueue.v1.ListTasksRequest;
import dataqueue.v1.QueueAdminGrpc;
import dataqueue.v1.QueueCounts;
import dataqueue.v1.QueueSettings;
import dataqueue.v1.RetryBackoff;
import dataqueue.v1.TaskInfo;
import dataqueue.v1.TaskState;
import dataqueue.v1.UpdateQueueRequest;
import io.grpc.ManagedChannel;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.concurrent.TimeUnit;
import java.util.function.BooleanSupplier;

/** The real server on a free port, with a store in a folder of its own that outlives its restarts. */
final class TestServer implements AutoCloseable {
    private static final String LISTENING = "listening on ";
    private static final long PATIENCE_NS = TimeUnit.SECONDS.toNanos(30);

    private final Path folder;
    private final List<String> flags;
    private Process process;
    private String address = "127.0.0.1:0";
    private ManagedChannel channel;

    TestServer(String... flags) throws IOException {
        this.flags = List.of(flags);
        folder = Files.createTempDirectory("data-queue-java");
        start();
        channel = Channels.open(address);
    }

    private static Path binary() {
        var given = System.getenv("DATA_QUEUE_SERVER");
        var binary = given != null ? Path.of(given) : Path.of("../../target/debug/data-queue-server");
        if (!Files.isExecutable(binary)) {
            throw new IllegalStateException(
                    "no server at " + binary + ": build it with `cargo build -p data-queue-server`, or set DATA_QUEUE_SERVER");
        }
        return binary.toAbsolutePath();
    }

    void start() throws IOException {
        var command = new ArrayList<>(
                List.of(binary().toString(), "--listen", address, "--data-dir", folder.toString(), "--durability", "memory"));
        command.addAll(flags);
        process = new ProcessBuilder(command)
                .redirectError(ProcessBuilder.Redirect.appendTo(folder.resolve("log").toFile()))
                .start();
        var output = process.inputReader(StandardCharsets.UTF_8);
        for (var line = output.readLine(); line != null; line = output.readLine()) {
            if (line.startsWith(LISTENING)) {
                address = line.substring(LISTENING.length());
                return;
            }
        }
        throw new IOException("the server did not start: " + Files.readString(folder.resolve("log")));
    }

    void kill() throws InterruptedException {
        process.destroyForcibly().waitFor();
    }

    /** Kills it, and starts it again on the same port and store. */
    void restart() throws IOException, InterruptedException {
        kill();
        start();
    }

    String address() {
        return address;
    }

    DataQueueGrpc.DataQueueBlockingStub queues() {
        return DataQueueGrpc.newBlockingStub(channel).withDeadlineAfter(30, TimeUnit.SECONDS);
    }

    QueueAdminGrpc.QueueAdminBlockingStub admin() {
        return QueueAdminGrpc.newBlockingStub(channel).withDeadlineAfter(30, TimeUnit.SECONDS);
    }

    QueueCounts counts(String queue) {
        return admin().getQueue(GetQueueRequest.newBuilder().setQueue(queue).build()).getQueue().getCounts();
    }

    List<TaskInfo> tasks(String queue, TaskState state) {
        return admin().listTasks(ListTasksRequest.newBuilder().setQueue(queue).setState(state).build()).getTasksList();
    }

    void delete(String queue, String id) {
        admin().deleteTasks(DeleteTasksRequest.newBuilder().setQueue(queue).addIds(id).build());
    }

    /** What failed comes again at once, or stays away for good. */
    void setBackoff(String queue, Duration backoff) {
        var retry = RetryBackoff.newBuilder().setMin(backoff).setMax(backoff);
        admin().updateQueue(UpdateQueueRequest.newBuilder()
                .setQueue(queue)
                .setSettings(QueueSettings.newBuilder().setRetryBackoff(retry))
                .setUpdateMask(com.google.protobuf.FieldMask.newBuilder().addPaths("retry_backoff.min").addPaths("retry_backoff.max"))
                .build());
    }

    static Duration millis(long millis) {
        return Duration.newBuilder().setSeconds(millis / 1_000).setNanos((int) (millis % 1_000) * 1_000_000).build();
    }

    static void until(String what, BooleanSupplier condition) throws InterruptedException {
        var limit = System.nanoTime() + PATIENCE_NS;
        while (!condition.getAsBoolean()) {
            if (System.nanoTime() > limit) {
                throw new AssertionError("in vain waited until " + what);
            }
            TimeUnit.MILLISECONDS.sleep(10);
        }
    }

    @Override
    public void close() throws IOException {
        channel.shutdownNow();
        process.destroyForcibly();
        process.onExit().join();
        try (var files = Files.walk(folder)) {
            for (var file : files.sorted(Comparator.reverseOrder()).toList()) {
                Files.delete(file);
            }
        }
    }
}
