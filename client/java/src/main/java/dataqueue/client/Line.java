package dataqueue.client;

import dataqueue.v1.ConsumeAck;
import dataqueue.v1.ConsumeHeartbeat;
import dataqueue.v1.ConsumePutback;
import dataqueue.v1.ConsumeRequest;
import dataqueue.v1.ConsumeResponse;
import io.grpc.Status;
import io.grpc.stub.ClientCallStreamObserver;
import io.grpc.stub.ClientResponseObserver;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.List;

/** One stream, and what was said on it and is not answered. gRPC calls it on the session's loop, one message at a time. */
final class Line implements ClientResponseObserver<ConsumeRequest, ConsumeResponse> {
    /** A stream that lived for less has proved nothing: drained, it is not replaced at once. */
    private static final Duration YOUNG = Duration.ofSeconds(1);
    /** No task has this token. A heartbeat for it is answered behind all that was sent before. */
    private static final String FENCE = "0".repeat(32);

    /** What is to be said about tasks; those with equal wishes go in one request. */
    record Wish(Kind kind, String queue, String reason) {
        enum Kind {
            ACK,
            PUT_BACK,
            FAIL,
            REJECT,
            FENCE
        }
    }

    /** A request that was sent and not answered. */
    record Sent(Wish wish, List<String> tokens) {}

    final ArrayDeque<Sent> sent = new ArrayDeque<>();
    /** Nothing has come yet: the first message tells what the stream took over. */
    boolean isNew = true;

    private final Session session;
    private final long since = System.nanoTime();
    private ClientCallStreamObserver<ConsumeRequest> requests;

    Line(Session session) {
        this.session = session;
    }

    @Override
    public void beforeStart(ClientCallStreamObserver<ConsumeRequest> stream) {
        requests = stream;
        stream.disableAutoRequestWithInitial(1);
        stream.setOnReadyHandler(() -> session.guard(session::flush));
    }

    @Override
    public void onNext(ConsumeResponse message) {
        try {
            session.receive(this, message);
            requests.request(1);
        } catch (IllegalStateException confusion) {
            requests.cancel(confusion.getMessage(), confusion);
        }
    }

    @Override
    public void onError(Throwable error) {
        session.guard(() -> session.broken(this, DataQueueException.of(error)));
    }

    @Override
    public void onCompleted() {
        session.guard(() -> session.broken(this, ended()));
    }

    /** The server has ended it, or is about to. */
    static DataQueueException ended() {
        return new DataQueueException(Status.Code.UNAVAILABLE, "the server ended the stream", null);
    }

    boolean isYoung() {
        return System.nanoTime() - since < YOUNG.toNanos();
    }

    boolean isReady() {
        return requests.isReady();
    }

    void say(ConsumeRequest request) {
        requests.onNext(request);
    }

    void say(Wish wish, List<String> tokens) {
        var request = ConsumeRequest.newBuilder();
        switch (wish.kind) {
            case ACK -> request.setAck(ConsumeAck.newBuilder().setQueue(wish.queue).addAllLeaseTokens(tokens));
            case FENCE -> request.setHeartbeat(ConsumeHeartbeat.newBuilder().setQueue(wish.queue).addAllLeaseTokens(tokens));
            default -> request.setPutback(ConsumePutback.newBuilder()
                    .setQueue(wish.queue)
                    .addAllLeaseTokens(tokens)
                    .setReason(wish.reason)
                    .setFailed(wish.kind == Wish.Kind.FAIL)
                    .setDeadLetter(wish.kind == Wish.Kind.REJECT));
        }
        sent.add(new Sent(wish, List.copyOf(tokens)));
        requests.onNext(request.build());
    }

    /** Has the server answer, behind what is on its way. */
    void sayFence(String queue) {
        say(new Wish(Wish.Kind.FENCE, queue, ""), List.of(FENCE));
    }

    void halfClose() {
        requests.onCompleted();
    }

    void cancel(String why) {
        requests.cancel(why, null);
    }
}
