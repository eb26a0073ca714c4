package dataqueue.client;

/** Thrown by a handler that does not want its task at all: it becomes a dead letter, with this message as its last error. */
public class Reject extends Exception {
    private static final long serialVersionUID = 1;

    /** Rejects for this reason. */
    public Reject(String reason) {
        super(reason);
    }

    /** Rejects for this reason, because of what was caught. */
    public Reject(String reason, Throwable cause) {
        super(reason, cause);
    }
}
