package dataqueue.client;

import java.util.Optional;

/** What a handler may know besides its task. */
public interface Context {
    /** Why a handler should not go on. */
    enum Cancellation {
        /** The worker's deadline for a task has passed: the task counts as failed, whatever the handler does. */
        DEADLINE,
        /** An operator deleted the task. */
        DELETED,
        /** The lease is lost: the task is delivered again, to somebody. */
        LEASE_LOST,
        /** The worker has stopped, and has given the task back. */
        STOPPED
    }

    /** Why the handler should not go on, if it should not. Its thread was interrupted when this was set. */
    Optional<Cancellation> cancellation();

    /** Whether the handler should not go on. */
    default boolean isCancelled() {
        return cancellation().isPresent();
    }

    /** Ends a handler that should not go on. */
    default void check() throws InterruptedException {
        var cancellation = cancellation();
        if (cancellation.isPresent()) {
            throw new InterruptedException("cancelled: " + cancellation.get());
        }
    }
}
