package dataqueue.client;

import dataqueue.v1.Task;

/** What is done with a task. */
@FunctionalInterface
public interface Handler {
    /**
     * Works on a task. Returns when it is done for good: it is acked then. What it throws makes the task fail, to come again
     * after the queue's backoff; {@link Reject} makes it a dead letter.
     *
     * <p>It runs on a thread of its own and may block. When the context is cancelled the thread is interrupted; a handler that catches
     * the interrupt without having finished must throw.
     */
    void handle(Task task, Context context) throws Exception;
}
