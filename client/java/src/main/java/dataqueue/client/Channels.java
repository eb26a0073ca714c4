package dataqueue.client;

import com.google.gson.Gson;
import com.google.gson.reflect.TypeToken;
import io.grpc.Channel;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.util.Map;
import java.util.Objects;
import java.util.concurrent.TimeUnit;

/** Channels to a server, for workers, producers, and the generated stubs. */
public final class Channels {
    /** A connection that does not answer a ping for this long is taken for dead. */
    private static final long KEEPALIVE_SECONDS = 10;
    /** A server sends up to twice its largest value in a message, which is 1 MiB unless set. */
    private static final int MAX_MESSAGE_BYTES = 64 << 20;

    private static final String HTTP = "http://";

    private Channels() {}

    /** The address in DATA_QUEUE_ADDR, or else 127.0.0.1:50051. */
    public static String defaultAddress() {
        var address = System.getenv("DATA_QUEUE_ADDR");
        return address == null || address.isEmpty() ? "127.0.0.1:50051" : address;
    }

    /** A channel to {@code HOST:PORT}, with or without {@code http://}, which connects when it is used, notices dead connections, and repeats what is safe to repeat. */
    public static ManagedChannel open(String address) {
        var isUrl = address.regionMatches(true, 0, HTTP, 0, HTTP.length());
        var target = isUrl ? address.substring(HTTP.length()).replaceFirst("/$", "") : address;
        return ManagedChannelBuilder.forTarget(target)
                .usePlaintext()
                .keepAliveTime(KEEPALIVE_SECONDS, TimeUnit.SECONDS)
                .keepAliveTimeout(KEEPALIVE_SECONDS, TimeUnit.SECONDS)
                .maxInboundMessageSize(MAX_MESSAGE_BYTES)
                .disableServiceConfigLookUp()
                .defaultServiceConfig(serviceConfig())
                .build();
    }

    /** Lets the next call try to connect at once, where gRPC itself would pause for up to two minutes. */
    static void hurry(Channel channel) {
        if (channel instanceof ManagedChannel managed) {
            managed.resetConnectBackoff();
        }
    }

    /** Makes later calls use a new connection, where another server may be; those that run go on. */
    static void leave(Channel channel) {
        if (channel instanceof ManagedChannel managed) {
            managed.enterIdle();
        }
    }

    private static Map<String, ?> serviceConfig() {
        var file = Objects.requireNonNull(Channels.class.getResourceAsStream("service_config.json"), "service_config.json");
        try (var reader = new InputStreamReader(file, StandardCharsets.UTF_8)) {
            return new Gson().fromJson(reader, new TypeToken<Map<String, Object>>() {}.getType());
        } catch (IOException error) {
            throw new UncheckedIOException("service_config.json", error);
        }
    }
}
