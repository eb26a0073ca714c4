package dataqueue.client;

import java.time.Duration;
import java.util.concurrent.ThreadLocalRandom;

/** Pauses between tries: up to 0.1 s, doubling to 2 s, a random half of it left out; and what the server asks for besides. */
final class Backoff {
    private static final long FIRST_MS = 100;
    private static final long LONGEST_MS = 2_000;

    private long limitMs = FIRST_MS;

    Duration after(DataQueueException error) {
        var pause = Duration.ofMillis(ThreadLocalRandom.current().nextLong(limitMs / 2, limitMs + 1));
        limitMs = Math.min(limitMs * 2, LONGEST_MS);
        return pause.plus(error.retryAfter().orElse(Duration.ZERO));
    }

    void reset() {
        limitMs = FIRST_MS;
    }
}
