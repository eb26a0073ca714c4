import { fromBinary, type DescMessage, type MessageShape } from "@bufbuild/protobuf";
import { durationMs } from "@bufbuild/protobuf/wkt";
import { Metadata, status, type StatusObject } from "@grpc/grpc-js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema, StatusSchema, type Status } from "./gen/google/rpc/errors_pb.js";

const DOMAIN = "dataqueue";
/** Codes by which a connection that broke, or a call that took too long, shows itself when no server gave a reason. */
const BROKEN = ["INTERNAL", "UNKNOWN", "CANCELLED", "DEADLINE_EXCEEDED"];

/** What a handler throws for a task that nobody should try again: it becomes a dead letter, with the message as its reason. */
export class Reject extends Error {
  override name = "Reject";
}

/** A call that failed: its code, and the server's reason and field if it gave them. */
export class DataQueueError extends Error {
  override name = "DataQueueError";

  constructor(
    /** The name of the gRPC code, such as `INVALID_ARGUMENT`. */
    readonly code: string,
    /** What the server or the channel said. */
    readonly text: string,
    /** The server's reason, such as `JSON_INVALID`. Undefined if the answer is not one of DataQueue's. */
    readonly reason?: string,
    /** The field that was refused, such as `tasks[1].json`. */
    readonly field?: string,
    /** How long the server asks to wait before the call is repeated. */
    readonly retryAfterMs?: number,
  ) {
    super(`${[code, reason].filter(Boolean).join(" ")}${field ? ` at ${field}` : ""}: ${text}`);
  }

  static from(failed: StatusObject): DataQueueError {
    const details = statusDetails(failed.metadata);
    const info = detail(details, ErrorInfoSchema);
    const delay = detail(details, RetryInfoSchema)?.retryDelay;
    return new DataQueueError(
      status[failed.code] ?? String(failed.code),
      failed.details,
      info?.domain === DOMAIN ? info.reason : undefined,
      detail(details, BadRequestSchema)?.fieldViolations[0]?.field,
      delay && durationMs(delay),
    );
  }

  /** The server is away, or cannot do it now: the same call may go through later. It may have taken effect. */
  get isTransient(): boolean {
    if (this.retryAfterMs !== undefined || this.code === "UNAVAILABLE") return true;
    return this.reason === undefined && BROKEN.includes(this.code);
  }
}

function statusDetails(metadata: Metadata | undefined): Status | undefined {
  const bytes = metadata?.get("grpc-status-details-bin")[0];
  if (!(bytes instanceof Uint8Array)) return undefined;
  try {
    return fromBinary(StatusSchema, bytes);
  } catch {
    return undefined; // A proxy may put anything there. The code and the text are left.
  }
}

function detail<D extends DescMessage>(details: Status | undefined, schema: D): MessageShape<D> | undefined {
  const any = details?.details.find((any) => any.typeUrl.endsWith(`/${schema.typeName}`));
  try {
    return any && fromBinary(schema, any.value);
  } catch {
    return undefined;
  }
}
