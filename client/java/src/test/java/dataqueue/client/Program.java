package dataqueue.client;

import dataqueue.v1.NewTask;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.time.Duration;
import java.util.HashMap;
import java.util.HexFormat;
import java.util.Map;
import java.util.concurrent.atomic.AtomicLong;

/** Tries the client out from the command line: the steps that every client does, or a worker until SIGTERM. */
public final class Program {
    private Program() {}

    /** See the usage below. */
    public static void main(String[] arguments) throws Exception {
        var options = options(arguments);
        switch (arguments.length == 0 ? "" : arguments[0]) {
            case "scenario" -> {
                var isWell = new Scenario(options.get("addr"), options.get("prefix")).run(Path.of(options.get("file")));
                System.exit(isWell ? 0 : 1);
            }
            case "work" -> work(options);
            default -> {
                System.err.println("scenario --addr HOST:PORT --file FILE --prefix P\n"
                        + "work --addr HOST:PORT --queue Q [--concurrency N] [--fail-every N] [--hold MS] [--grace MS]");
                System.exit(2);
            }
        }
    }

    private static Map<String, String> options(String[] arguments) {
        var options = new HashMap<String, String>();
        for (var at = 1; at + 1 < arguments.length; at += 2) {
            options.put(arguments[at].replaceFirst("^--", ""), arguments[at + 1]);
        }
        return options;
    }

    private static void work(Map<String, String> options) {
        var failEvery = Long.parseLong(options.getOrDefault("fail-every", "0"));
        var hold = Long.parseLong(options.getOrDefault("hold", "0"));
        var deliveries = new AtomicLong();
        var worker = Worker.builder((task, context) -> {
                    var value = value(task);
                    say("delivered " + task.getId() + " " + task.getLeaseToken() + " " + md5(value));
                    var number = deliveries.incrementAndGet();
                    if (hold > 0) {
                        Thread.sleep(hold);
                    }
                    if (failEvery > 0 && number % failEvery == 0) {
                        throw new IllegalStateException("as asked");
                    }
                })
                .address(options.getOrDefault("addr", Channels.defaultAddress()))
                .queue(options.get("queue"))
                .concurrency(Integer.parseInt(options.getOrDefault("concurrency", "16")))
                .grace(Duration.ofMillis(Long.parseLong(options.getOrDefault("grace", "30000"))))
                .listener(new Worker.Listener() {
                    @Override
                    public void acked(dataqueue.v1.Task task) {
                        say("acked " + task.getId() + " " + task.getLeaseToken());
                    }

                    @Override
                    public void lost(dataqueue.v1.Task task) {
                        say("lost " + task.getId() + " " + task.getLeaseToken());
                    }
                })
                .build();
        // The machine ends when this hook has ended, with code 0 although a signal began it.
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            worker.close();
            say("stopped");
            Runtime.getRuntime().halt(0);
        }));
        try {
            worker.run();
        } catch (DataQueueException error) {
            System.err.println(error.getMessage());
            Runtime.getRuntime().halt(1);
        }
    }

    static synchronized void say(String line) {
        System.out.println(line);
        System.out.flush();
    }

    static byte[] value(dataqueue.v1.Task task) {
        return task.hasJson() ? task.getJson().getBytes(StandardCharsets.UTF_8) : task.getData().toByteArray();
    }

    static String md5(byte[] value) throws Exception {
        return HexFormat.of().formatHex(MessageDigest.getInstance("MD5").digest(value));
    }

    static NewTask json(String json) {
        return NewTask.newBuilder().setJson(json).build();
    }
}
