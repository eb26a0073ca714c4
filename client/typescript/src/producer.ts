import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { durationFromMs, timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { Client } from "@grpc/grpc-js";
import { DataQueueError } from "./errors.js";
import { DataQueue, NewTaskSchema, type InsertResponse, type InsertResult } from "./gen/dataqueue/v1/data_queue_pb.js";
import { Backoff, connect, stub, type Stub } from "./grpc.js";

/** How long one try of an insert may take, so that a server that hangs is asked again. */
const TRY_MS = 10_000;
/** Request ids are remembered for 5 minutes: a repeat that comes later would insert twice. */
const MAX_TIMEOUT_MS = 300_000;

/** A task to insert: one JSON text, delivered byte for byte as given, or bytes. */
export type TaskInput = ({ json: string; data?: undefined } | { data: Uint8Array; json?: undefined }) & {
  headers?: Record<string, string>;
  /** 0 to 9; a higher one is delivered before any of a lower one. */
  priority?: number;
  /** After how long it can be popped. */
  delayMs?: number;
  /** The same as a time. */
  deliverAt?: Date;
  /** After how long it is gone if nobody holds it. */
  ttlMs?: number;
  /** While a task with this key is in the queue another is not inserted: its result is that one's id, with `duplicate`. */
  uniqueKey?: string;
};

export interface InsertOptions {
  /** Makes an insert that is repeated by another process insert once. Default: a random UUID. */
  requestId?: string;
  /** For how long the insert is tried, less than 5 minutes. Default: the producer's. */
  timeoutMs?: number;
}

export interface BatchOptions {
  /** The most tasks of one insert. Default: 1,000. */
  maxTasks?: number;
  /** About how many bytes of tasks go in one insert. Default: 1 MiB. */
  maxBytes?: number;
  /** How long a task waits for others. Default: 5 ms. */
  lingerMs?: number;
  /** How many inserts are under way at once; `add` waits beyond. Default: 4. */
  maxInFlight?: number;
}

/** Inserts tasks; each insert is repeated until it is known to have happened once, or is refused, or its time is over. */
export class Producer {
  readonly #client: Client;
  readonly #calls: Stub<typeof DataQueue>;
  readonly #timeoutMs: number;

  constructor(options: { address?: string; timeoutMs?: number } = {}) {
    this.#timeoutMs = checked(options.timeoutMs ?? 30_000);
    this.#client = connect(options.address);
    this.#calls = stub(DataQueue, this.#client);
  }

  /** Inserts 1 to 1,000 tasks, all or none. */
  async insert(queue: string, tasks: TaskInput | TaskInput[], options: InsertOptions = {}): Promise<InsertResponse> {
    const request = { queue, tasks: [tasks].flat().map(newTask), requestId: options.requestId ?? randomUUID() };
    const until = performance.now() + checked(options.timeoutMs ?? this.#timeoutMs);
    const backoff = new Backoff();
    for (;;) {
      try {
        const timeoutMs = Math.min(TRY_MS, until - performance.now());
        return await this.#calls.insert(request, { timeoutMs });
      } catch (error) {
        if (!(error instanceof DataQueueError) || !error.isTransient) throw error;
        const pause = backoff.pause() + (error.retryAfterMs ?? 0);
        if (performance.now() + pause >= until) throw error;
        await sleep(pause);
      }
    }
  }

  /** Collects tasks for one queue and inserts many as one call. */
  batch(queue: string, options: BatchOptions = {}): Batch {
    return new Batch((tasks) => this.insert(queue, tasks), options);
  }

  /** Ends the connection. */
  close(): void {
    this.#client.close();
  }
}

interface Waiting {
  task: TaskInput;
  resolve(result: InsertResult): void;
  reject(error: unknown): void;
}

/** Collects tasks and inserts them together: an insert that is refused is refused for all of its tasks. */
export class Batch {
  readonly #insert: (tasks: TaskInput[]) => Promise<InsertResponse>;
  readonly #options: Required<BatchOptions>;
  readonly #inFlight = new Set<Promise<void>>();
  #waiting: Waiting[] = [];
  #bytes = 0;
  #linger: NodeJS.Timeout | undefined;
  #room: Promise<void> = Promise.resolve();
  #failure: { error: unknown } | undefined;
  #isClosed = false;

  constructor(insert: (tasks: TaskInput[]) => Promise<InsertResponse>, options: BatchOptions) {
    this.#insert = insert;
    this.#options = {
      maxTasks: options.maxTasks ?? 1_000,
      maxBytes: options.maxBytes ?? 1 << 20,
      lingerMs: options.lingerMs ?? 5,
      maxInFlight: options.maxInFlight ?? 4,
    };
    if (!(this.#options.maxInFlight >= 1)) throw new RangeError("maxInFlight is less than 1");
  }

  /** Takes a task as soon as there is room for it. Its `result` comes when it is inserted; who does not look at it learns of a failure by `flush`. */
  add(task: TaskInput): Promise<{ result: Promise<InsertResult> }> {
    if (this.#isClosed) return Promise.reject(new Error("the batch is closed"));
    // One after the other, so that tasks are inserted in the order of their adds.
    const added = this.#room.then(() => this.#take(task));
    this.#room = added.then(() => {}, () => {});
    return added;
  }

  /** Waits until all that was added is inserted. Throws the first failure since the last flush. */
  async flush(): Promise<void> {
    await this.#room;
    while (this.#waiting.length > 0 || this.#inFlight.size > 0) {
      await this.#hasRoom();
      this.#send();
      await Promise.all(this.#inFlight);
    }
    const failure = this.#failure;
    this.#failure = undefined;
    if (failure) throw failure.error;
  }

  /** Flushes, and takes no more tasks. */
  async close(): Promise<void> {
    this.#isClosed = true;
    await this.flush();
  }

  async #take(task: TaskInput): Promise<{ result: Promise<InsertResult> }> {
    const size = sizeOf(task);
    if (this.#waiting.length >= this.#options.maxTasks || (this.#waiting.length > 0 && this.#bytes + size > this.#options.maxBytes)) {
      await this.#hasRoom();
      this.#send();
    }
    const result = new Promise<InsertResult>((resolve, reject) => this.#waiting.push({ task, resolve, reject }));
    result.catch(() => {});
    this.#bytes += size;
    this.#linger ??= setTimeout(() => {
      this.#linger = undefined;
      if (this.#inFlight.size < this.#options.maxInFlight) this.#send();
    }, this.#options.lingerMs);
    return { result };
  }

  async #hasRoom(): Promise<void> {
    while (this.#inFlight.size >= this.#options.maxInFlight) await Promise.race(this.#inFlight);
  }

  #send(): void {
    clearTimeout(this.#linger);
    this.#linger = undefined;
    const batch = this.#waiting;
    if (batch.length === 0) return;
    this.#waiting = [];
    this.#bytes = 0;
    const sent = this.#insert(batch.map(({ task }) => task)).then(
      ({ results }) => batch.forEach(({ resolve }, i) => resolve(results[i]!)),
      (error: unknown) => {
        this.#failure ??= { error };
        batch.forEach(({ reject }) => reject(error));
      },
    ).finally(() => {
      this.#inFlight.delete(sent);
      // What lingered long enough while all inserts were under way has waited for this.
      if (this.#linger === undefined) this.#send();
    });
    this.#inFlight.add(sent);
  }
}

function newTask({ json, data, delayMs, deliverAt, ttlMs, ...rest }: TaskInput): MessageInitShape<typeof NewTaskSchema> {
  return {
    ...rest,
    value: json !== undefined ? { case: "json", value: json } : { case: "data", value: data },
    delay: delayMs === undefined ? undefined : durationFromMs(delayMs),
    deliverAt: deliverAt && timestampFromDate(deliverAt),
    ttl: ttlMs === undefined ? undefined : durationFromMs(ttlMs),
  };
}

function sizeOf(task: TaskInput): number {
  const value = task.json !== undefined ? Buffer.byteLength(task.json) : task.data.byteLength;
  return Object.entries(task.headers ?? {}).reduce((sum, [key, text]) => sum + Buffer.byteLength(key) + Buffer.byteLength(text) + 8, value + 160);
}

function checked(timeoutMs: number): number {
  if (!(timeoutMs > 0 && timeoutMs < MAX_TIMEOUT_MS)) throw new RangeError("the timeout of an insert is not between 0 and 5 minutes");
  return timeoutMs;
}
