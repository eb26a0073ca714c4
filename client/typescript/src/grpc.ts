import {
  create, fromBinary, toBinary,
  type DescMessage, type DescMethodServerStreaming, type DescMethodUnary, type DescService, type MessageInitShape, type MessageShape,
} from "@bufbuild/protobuf";
import { Client, credentials, type ChannelOptions, type ClientDuplexStream, type ServiceError } from "@grpc/grpc-js";
import { DataQueueError } from "./errors.js";
import { DataQueue } from "./gen/dataqueue/v1/data_queue_pb.js";
import { SERVICE_CONFIG } from "./gen/service_config.js";

const CHANNEL: ChannelOptions = {
  "grpc.keepalive_time_ms": 10_000,
  "grpc.keepalive_timeout_ms": 10_000,
  "grpc.initial_reconnect_backoff_ms": 100,
  "grpc.max_reconnect_backoff_ms": 2_000,
  // The largest answer is bounded by the server's settings, which may be higher than gRPC's 4 MiB.
  "grpc.max_receive_message_length": 64 << 20,
  "grpc.service_config": SERVICE_CONFIG,
  "grpc.service_config_disable_resolution": 1,
};

export interface CallOptions {
  /** After how long the call is given up, with DEADLINE_EXCEEDED. Default: never. */
  timeoutMs?: number;
}

/** The calls of a service: those with one answer as functions, those with many as async iterables. */
export type Stub<S extends DescService> = {
  [K in keyof S["method"]]: S["method"][K] extends DescMethodUnary<infer I, infer O>
    ? (request: MessageInitShape<I>, options?: CallOptions) => Promise<MessageShape<O>>
    : S["method"][K] extends DescMethodServerStreaming<infer I, infer O>
      ? (request: MessageInitShape<I>, options?: CallOptions) => AsyncIterable<MessageShape<O>>
      : never;
};

/** A connection to the server, made with the first call. `host:port`, with or without `http://`; default: DATA_QUEUE_ADDR, or 127.0.0.1:50051. */
export function connect(address = process.env["DATA_QUEUE_ADDR"] || "127.0.0.1:50051", options: ChannelOptions = {}): Client {
  const target = address.replace(/^http:\/\//i, "").replace(/\/$/, "");
  // What was given is not repeated in the error: it may carry credentials.
  if (!/^([^\s:/?#@[\]]+|\[[^\s/?#@[\]]+\]):\d{1,5}$/.test(target)) {
    throw new TypeError("the address is not host:port, with or without http://, such as 127.0.0.1:50051");
  }
  return new Client(target, credentials.createInsecure(), { ...CHANNEL, ...options });
}

/** The calls of `service` over `client`. They fail with a DataQueueError. */
export function stub<S extends DescService>(service: S, client: Client): Stub<S> {
  const calls: Record<string, unknown> = {};
  for (const method of service.methods) {
    const path = `/${service.typeName}/${method.name}`;
    const read = reader(method.output);
    if (method.methodKind === "unary") {
      calls[method.localName] = async (request: MessageInitShape<DescMessage>, options?: CallOptions) => {
        // Written here and not by the channel, so that what cannot be written is the caller's error and not one of the server.
        const bytes = write(method.input, request);
        return new Promise((resolve, reject) => {
          client.makeUnaryRequest(path, same, read, bytes, deadline(options), (error, answer) =>
            error ? reject(DataQueueError.from(error)) : resolve(answer));
        });
      };
    } else if (method.methodKind === "server_streaming") {
      calls[method.localName] = async function* (request: MessageInitShape<DescMessage>, options?: CallOptions) {
        const call = client.makeServerStreamRequest(path, same, read, write(method.input, request), deadline(options));
        try {
          yield* call;
        } catch (error) {
          throw DataQueueError.from(error as ServiceError);
        } finally {
          call.cancel();
        }
      };
    }
  }
  return calls as Stub<S>;
}

type Consume = typeof DataQueue.method.consume;

/** Opens a Consume stream. */
export function consume(client: Client): ClientDuplexStream<MessageInitShape<Consume["input"]>, MessageShape<Consume["output"]>> {
  const { input, output, name } = DataQueue.method.consume;
  return client.makeBidiStreamRequest(`/${DataQueue.typeName}/${name}`, (request) => write(input, request), reader(output), {});
}

/** Pauses from 0.1 s, doubling to 2 s, of which up to a half is left off at random. */
export class Backoff {
  #next = 100;

  pause(): number {
    const pause = this.#next * (1 - Math.random() / 2);
    this.#next = Math.min(this.#next * 2, 2_000);
    return pause;
  }

  reset(): void {
    this.#next = 100;
  }
}

function deadline(options: CallOptions | undefined) {
  return options?.timeoutMs === undefined ? {} : { deadline: Date.now() + options.timeoutMs };
}

function write<D extends DescMessage>(schema: D, message: MessageInitShape<D>): Buffer {
  const bytes = toBinary(schema, create(schema, message));
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

function reader<D extends DescMessage>(schema: D): (bytes: Buffer) => MessageShape<D> {
  return (bytes) => fromBinary(schema, bytes);
}

function same(bytes: Buffer): Buffer {
  return bytes;
}
