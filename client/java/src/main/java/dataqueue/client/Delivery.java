package dataqueue.client;

import dataqueue.v1.Task;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.HexFormat;
import java.util.Optional;

/** A task that was delivered, until the server has confirmed its end; and the thread that works on it. */
final class Delivery implements Context {
    final Task task;
    /** Its ack or putback is to be said, or said. Only the session's loop touches this. */
    boolean isSettled;

    private Cancellation cancellation;
    private Thread thread;
    private boolean isOver;

    Delivery(Task task) {
        this.task = task;
    }

    /** Whether the calling thread is to work on it. */
    synchronized boolean begin() {
        if (isOver) {
            return false;
        }
        thread = Thread.currentThread();
        if (cancellation != null) {
            thread.interrupt();
        }
        return true;
    }

    /** The calling thread has done with it: from now on it is not interrupted because of it, and no such interrupt is left over. */
    synchronized void end() {
        isOver = true;
        thread = null;
        if (cancellation != null) {
            Thread.interrupted();
        }
    }

    /** Keeps it from beginning. False if it has begun. */
    synchronized boolean withdraw() {
        if (thread != null || isOver) {
            return false;
        }
        isOver = true;
        return true;
    }

    synchronized void cancel(Cancellation why) {
        if (cancellation == null && !isOver) {
            cancellation = why;
            if (thread != null) {
                thread.interrupt();
            }
        }
    }

    @Override
    public synchronized Optional<Cancellation> cancellation() {
        return Optional.ofNullable(cancellation);
    }

    /** What is wrong with the value as it arrived, if anything. */
    Optional<String> damage() {
        var value = task.hasJson() ? task.getJson().getBytes(StandardCharsets.UTF_8) : task.getData().toByteArray();
        try {
            var md5 = HexFormat.of().formatHex(MessageDigest.getInstance("MD5").digest(value));
            return md5.equals(task.getMd5())
                    ? Optional.empty()
                    : Optional.of("the value arrived damaged: its MD5 is " + md5 + " instead of " + task.getMd5());
        } catch (NoSuchAlgorithmException missing) {
            throw new IllegalStateException("every Java platform has MD5", missing);
        }
    }
}
