package dataqueue.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.List;
import java.util.Optional;

/** What a call came to, if not an answer: {@code INVALID_ARGUMENT JSON_INVALID at tasks[1].json: text}. */
public final class DataQueueException extends RuntimeException {
    private static final long serialVersionUID = 1;
    private static final String DOMAIN = "dataqueue";

    private final Status.Code code;
    private final String reason;
    private final String field;
    private final Duration retryAfter;

    private DataQueueException(
            Status.Code code, String reason, String field, Duration retryAfter, String text, Throwable cause) {
        super(code + (reason == null ? "" : " " + reason) + (field == null ? "" : " at " + field) + ": " + text, cause);
        this.code = code;
        this.reason = reason;
        this.field = field;
        this.retryAfter = retryAfter;
    }

    DataQueueException(Status.Code code, String text, Throwable cause) {
        this(code, null, null, null, text, cause);
    }

    /** Reads what gRPC made of a call. */
    public static DataQueueException of(Throwable error) {
        if (error instanceof DataQueueException known) {
            return known;
        }
        var status = Status.fromThrowable(error);
        String reason = null;
        String field = null;
        Duration retryAfter = null;
        var details = details(error);
        for (Any detail : details == null ? List.<Any>of() : details.getDetailsList()) {
            var info = unpack(detail, ErrorInfo.class);
            if (info.isPresent() && info.get().getDomain().equals(DOMAIN)) {
                reason = info.get().getReason();
            }
            var request = unpack(detail, BadRequest.class);
            if (request.isPresent() && request.get().getFieldViolationsCount() > 0) {
                field = request.get().getFieldViolations(0).getField();
            }
            var retry = unpack(detail, RetryInfo.class);
            if (retry.isPresent()) {
                var delay = retry.get().getRetryDelay();
                retryAfter = Duration.ofSeconds(delay.getSeconds(), delay.getNanos());
            }
        }
        var text = status.getDescription() == null ? String.valueOf(error.getMessage()) : status.getDescription();
        return new DataQueueException(status.getCode(), reason, field, retryAfter, text, error);
    }

    /** What cannot be read is as good as absent: a proxy may put anything there. The code and the text are left. */
    private static com.google.rpc.Status details(Throwable error) {
        try {
            return StatusProto.fromThrowable(error);
        } catch (RuntimeException unreadable) {
            return null;
        }
    }

    private static <T extends Message> Optional<T> unpack(Any detail, Class<T> type) {
        try {
            return detail.is(type) ? Optional.of(detail.unpack(type)) : Optional.empty();
        } catch (InvalidProtocolBufferException damaged) {
            return Optional.empty();
        }
    }

    /** The gRPC code. */
    public Status.Code code() {
        return code;
    }

    /** Why, in one word of the contract's, such as {@code QUEUE_FULL}: there only if the server itself refused. */
    public Optional<String> reason() {
        return Optional.ofNullable(reason);
    }

    /** The refused field, such as {@code tasks[1].json}. */
    public Optional<String> field() {
        return Optional.ofNullable(field);
    }

    /** When the server says that a retry may help. */
    public Optional<Duration> retryAfter() {
        return Optional.ofNullable(retryAfter);
    }

    /** Whether the same request may be answered later: the server is away, or has too much to do. */
    boolean mayPass() {
        return switch (code) {
            case UNAVAILABLE, DEADLINE_EXCEEDED -> true;
            case RESOURCE_EXHAUSTED -> retryAfter != null;
            // Without a reason it was no refusal: a connection or a proxy broke.
            case INTERNAL, UNKNOWN, CANCELLED -> reason == null;
            default -> false;
        };
    }
}
