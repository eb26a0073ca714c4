import { createHash, randomBytes } from "node:crypto";
import { create, toBinary, type MessageInitShape, type MessageShape } from "@bufbuild/protobuf";
import { durationFromMs, timestampDate } from "@bufbuild/protobuf/wkt";
import type { Client, StatusObject } from "@grpc/grpc-js";
import { DataQueueError, Reject } from "./errors.js";
import {
  ConsumeOpenSchema, Outcome, type ConsumeRequestSchema, type ConsumeResponse, type ResumedQueue, type Task as TaskMessage,
} from "./gen/dataqueue/v1/data_queue_pb.js";
import { Backoff, connect, consume } from "./grpc.js";

const MAX_BATCH = 1_000;
/** How long a stream may take to open: a connection whose other end accepts it and says nothing is not noticed by pings. */
const OPEN_WITHIN_MS = 20_000;
const MAX_REASON_BYTES = 1_024;
/** How long a stream that another one has replaced may take for the answers that it owes. */
const FAREWELL_MS = 1_000;
/** How long the last answers are awaited. */
const LAST_ANSWERS_MS = 5_000;
/** The longest time that a timer of Node.js can be set to. */
const MAX_TIMER_MS = 2 ** 31 - 1;
/** A token that no task has: a heartbeat for it extends nothing, and is answered when all that came before it was. */
const NO_TOKEN = "0".repeat(32);

/** A task as a handler gets it: `json` or `data` is set. */
export interface Task {
  id: string;
  queue: string;
  leaseToken: string;
  json?: string;
  data?: Uint8Array;
  md5: string;
  headers: Record<string, string>;
  /** How often it was delivered, this time included. */
  deliveries: number;
  /** How often a handler failed with it. */
  failures: number;
  /** How often its lease ran out. */
  expiries: number;
  priority: number;
  insertedAt: Date;
}

/** Works on a task. Returning acks it, throwing puts it back as failed, throwing a Reject makes it a dead letter. */
export type Handler = (task: Task, context: { signal: AbortSignal }) => unknown;

export interface WorkerOptions {
  /** Default: DATA_QUEUE_ADDR, or 127.0.0.1:50051. */
  address?: string;
  /** Names, or names with their weights: the shares of the deliveries. */
  queues: (string | { name: string; weight?: number })[];
  /** The most handlers at once. Default: 16. */
  concurrency?: number;
  /** How long tasks are held beyond the life of this process. Default: the queue's. */
  leaseMs?: number;
  /** For how long the server holds a task for its handler. Default: the server's, 1 h. */
  maxHoldMs?: number;
  /** A handler that takes longer is aborted and has failed. Default: none. */
  deadlineMs?: number;
  /** How long handlers may go on after `stop`. Default: 30 s. */
  graceMs?: number;
  /** The ack is confirmed: the task is gone for good. */
  onAcked?: (task: Task) => void;
  /** The lease was lost before the ack: the task is delivered again, to this worker or another. */
  onLost?: (task: Task) => void;
  /** A handler threw, or was past its deadline, or the task came damaged. */
  onFailed?: (task: Task, error: unknown) => void;
  /** The stream broke; another one is tried. */
  onDisconnected?: (error: DataQueueError) => void;
}

type Request = NonNullable<MessageInitShape<typeof ConsumeRequestSchema>["request"]>;
type Wish = { kind: "ack" } | { kind: "putback"; reason?: string; failed?: boolean; deadLetter?: boolean };
type Why = "deadline" | "cancelled" | "lost" | "stopped";

/** A task that the server counts as ours until the answer to its wish is here. */
interface Held {
  task: Task;
  abort: AbortController;
  why?: Why;
  /** What is to become of it: said, or about to be. */
  wish?: Wish;
}

interface Ask {
  queue: string;
  token: string;
  wish: Wish;
}

interface Line {
  client: Client;
  call: ReturnType<typeof consume>;
  isOpen: boolean;
  isFirstMessage: boolean;
  /** The requests that are not answered, in their order; one without asks is a heartbeat that is never said again. */
  sent: Ask[][];
}

/** Runs a handler for each task of its queues, over a stream that it opens anew whenever it breaks. */
export class Worker {
  /** What became of the tasks so far. */
  readonly stats = { acked: 0, failed: 0, rejected: 0, lost: 0 };
  readonly #options: WorkerOptions;
  readonly #handler: Handler;
  readonly #concurrency: number;
  readonly #open: MessageShape<typeof ConsumeOpenSchema>;
  readonly #backoff = new Backoff();
  readonly #held = new Map<string, Held>();
  readonly #lines = new Set<Line>();
  readonly #done: Promise<void>;
  #finish!: { resolve: () => void; reject: (error: DataQueueError) => void };
  #waiting: Held[] = [];
  #running = 0;
  #asks: Ask[] = [];
  /** The newest stream, which may not be open yet, and the one on which requests are said. */
  #newest: Line | undefined;
  #speaking: Line | undefined;
  #flush: NodeJS.Immediate | undefined;
  #reconnect: NodeJS.Timeout | undefined;
  #grace: NodeJS.Timeout | undefined;
  #lastAnswers: NodeJS.Timeout | undefined;
  /** The session was lost to another stream, and none has brought anything since. */
  #wasTakenOver = false;
  #state: "new" | "running" | "stopping" | "closing" | "ended" = "new";

  constructor(options: WorkerOptions, handler: Handler) {
    this.#options = options;
    this.#handler = handler;
    this.#done = new Promise((resolve, reject) => (this.#finish = { resolve, reject }));
    this.#done.catch(() => {}); // Who calls run sees it.
    this.#concurrency = options.concurrency ?? 16;
    this.#open = create(ConsumeOpenSchema, {
      queues: options.queues.map((queue) => (typeof queue === "string" ? { name: queue } : queue)),
      lease: options.leaseMs === undefined ? undefined : durationFromMs(options.leaseMs),
      maxHold: options.maxHoldMs === undefined ? undefined : durationFromMs(options.maxHoldMs),
      maxOutstanding: this.#concurrency,
      session: randomBytes(16),
    });
    // What cannot be written is an error of the caller's, who hears of it here.
    toBinary(ConsumeOpenSchema, this.#open);
    connect(options.address).close();
    for (const ms of [options.deadlineMs ?? 1, options.graceMs ?? 0]) {
      if (!(ms >= 0 && ms <= MAX_TIMER_MS)) throw new RangeError("deadlineMs and graceMs are between 0 and 24 days");
    }
  }

  /** Works until `stop` was called and all is settled. Throws the error that no other stream would help against. */
  run(): Promise<void> {
    if (this.#state === "new") {
      this.#state = "running";
      this.#connect();
    }
    return this.#done;
  }

  /**
   * Takes no more tasks, gives back those that no handler has begun, and lets the running handlers finish for `graceMs`; then they are
   * aborted and their tasks put back. Resolves as `run` does.
   */
  stop(): Promise<void> {
    if (this.#state === "new") this.#end();
    if (this.#state !== "running") return this.#done;
    this.#state = "stopping";
    this.#hush();
    for (const held of this.#waiting.splice(0)) this.#wish(held, { kind: "putback" });
    this.#grace = setTimeout(() => {
      for (const held of this.#held.values()) {
        if (held.wish) continue;
        this.#abort(held, "stopped");
        this.#wish(held, { kind: "putback" });
      }
      this.#endIfSettled();
    }, this.#options.graceMs ?? 30_000);
    this.#endIfSettled();
    return this.#done;
  }

  #connect(): void {
    // A connection of its own for each stream: that of the last one may be dead, or lead to a server that is stopping.
    const client = connect(this.#options.address, { "grpc.use_local_subchannel_pool": 1 });
    const call = consume(client);
    const line: Line = { client, call, isOpen: false, isFirstMessage: true, sent: [] };
    this.#newest = line;
    this.#lines.add(line);
    const late = setTimeout(() => {
      if (!line.isOpen) call.cancel();
    }, OPEN_WITHIN_MS);
    late.unref();
    call.on("metadata", () => this.#opened(line));
    call.on("data", (message: ConsumeResponse) => this.#receive(line, message));
    call.on("error", () => {}); // The status says the same.
    call.on("status", (status: StatusObject) => {
      clearTimeout(late);
      this.#broke(line, status);
    });
    // A stream cannot be opened with less than 1. A worker that stops says behind it that it wants none.
    const maxOutstanding = this.#state === "running" ? this.#concurrency : 1;
    call.write({ request: { case: "open", value: { ...this.#open, maxOutstanding } } });
  }

  #opened(line: Line): void {
    if (line !== this.#newest || line.isOpen) return;
    line.isOpen = true;
    const left = this.#speaking;
    this.#speaking = line;
    if (left) setTimeout(() => left.call.cancel(), FAREWELL_MS).unref();
    if (this.#state !== "running") this.#hush();
    else if (this.#held.size > 0) this.#askForWord();
    this.#flushAsks();
    this.#endIfSettled();
  }

  #receive(line: Line, message: ConsumeResponse): void {
    if (this.#state === "ended" || !this.#lines.has(line)) return;
    this.#opened(line);
    if (line.isFirstMessage) {
      line.isFirstMessage = false;
      this.#resume(message.resumed);
    }
    if (message.tasks.length > 0 || message.answers.length > 0) {
      this.#backoff.reset();
      this.#wasTakenOver = false;
    }
    for (const { outcomes } of message.answers) {
      const asks = line.sent.shift();
      if (!asks || (asks.length > 0 && asks.length !== outcomes.length)) {
        return this.#end(new DataQueueError("INTERNAL", "the server answered what it was not asked"));
      }
      asks.forEach((ask, i) => this.#answered(ask, outcomes[i]!));
    }
    for (const task of message.tasks) this.#deliver(task);
    for (const token of message.cancel.flatMap((cancelled) => cancelled.leaseTokens)) {
      const held = this.#held.get(token);
      if (held) this.#abort(held, "cancelled");
    }
    if (message.drain && line === this.#newest) this.#connectIn(this.#backoff.pause());
    this.#endIfSettled();
  }

  /** What we hold and the server does not know of is lost; what it holds for us and we do not know of was lost on its way. */
  #resume(resumed: ResumedQueue[]): void {
    const theirs = new Set(resumed.flatMap((queue) => queue.leaseTokens));
    for (const [token, held] of this.#held) {
      if (theirs.has(token) || held.wish) continue;
      const at = this.#waiting.indexOf(held);
      if (at >= 0) {
        this.#waiting.splice(at, 1);
        this.#wish(held, { kind: "putback" });
      } else {
        this.#abort(held, "lost");
      }
    }
    for (const { queue, leaseTokens } of resumed) {
      for (const token of leaseTokens) {
        if (!this.#held.has(token)) this.#ask({ queue, token, wish: { kind: "putback" } });
      }
    }
  }

  #deliver(message: TaskMessage): void {
    if (this.#held.has(message.leaseToken)) return;
    const held: Held = { task: taskOf(message), abort: new AbortController() };
    this.#held.set(message.leaseToken, held);
    const md5 = createHash("md5").update(held.task.json ?? held.task.data ?? "").digest("hex");
    if (md5 !== message.md5) {
      this.#fail(held, new Error(`the value arrived damaged: its md5 is ${md5}, and was ${message.md5} when it was inserted`));
    } else if (this.#state === "running") {
      this.#waiting.push(held);
      this.#begin();
      // More than that wait only if the server takes some that run for lost; the oldest may be lost too.
      if (this.#waiting.length > this.#concurrency) this.#wish(this.#waiting.shift()!, { kind: "putback" });
    } else {
      this.#wish(held, { kind: "putback" });
    }
  }

  #begin(): void {
    while (this.#running < this.#concurrency && this.#waiting.length > 0) void this.#work(this.#waiting.shift()!);
  }

  async #work(held: Held): Promise<void> {
    this.#running += 1;
    const { deadlineMs } = this.#options;
    const deadline = deadlineMs === undefined ? undefined : setTimeout(() => this.#abort(held, "deadline"), deadlineMs);
    let thrown: { error: unknown } | undefined;
    try {
      await this.#handler(held.task, { signal: held.abort.signal });
    } catch (error) {
      thrown = { error };
    }
    clearTimeout(deadline);
    this.#running -= 1;
    // Once it was put back by `stop`, what its handler did does not count any more.
    if (!held.wish && this.#state !== "ended") {
      if (held.why === "deadline") this.#fail(held, held.abort.signal.reason);
      else if (!thrown) this.#wish(held, { kind: "ack" });
      else if (held.why) this.#wish(held, { kind: "putback" });
      else this.#fail(held, thrown.error);
    }
    this.#begin();
    this.#endIfSettled();
  }

  #fail(held: Held, error: unknown): void {
    const reason = reasonOf(error);
    const isRejected = error instanceof Reject;
    this.stats[isRejected ? "rejected" : "failed"] += 1;
    this.#wish(held, isRejected ? { kind: "putback", deadLetter: true, reason } : { kind: "putback", failed: true, reason });
    if (!isRejected) this.#call(() => this.#options.onFailed?.(held.task, error));
  }

  #abort(held: Held, why: Why): void {
    if (held.why || held.wish) return;
    held.why = why;
    held.abort.abort(new Error({
      deadline: `deadline of ${(this.#options.deadlineMs ?? 0) / 1_000} s passed`,
      cancelled: "the task was deleted",
      lost: "the lease was lost",
      stopped: "the worker stops",
    }[why]));
  }

  #wish(held: Held, wish: Wish): void {
    held.wish = wish;
    this.#ask({ queue: held.task.queue, token: held.task.leaseToken, wish });
  }

  #ask(ask: Ask): void {
    this.#asks.push(ask);
    // Those that end in the same turn of the event loop go in one message.
    this.#flush ??= setImmediate(() => this.#flushAsks());
  }

  #flushAsks(): void {
    clearImmediate(this.#flush);
    this.#flush = undefined;
    const line = this.#speaking;
    if (!line || this.#state === "closing" || this.#state === "ended") return;
    const alike = new Map<string, Ask[]>();
    for (const ask of this.#asks.splice(0)) {
      const key = JSON.stringify([ask.queue, ask.wish]);
      const asks = alike.get(key);
      if (asks) asks.push(ask);
      else alike.set(key, [ask]);
    }
    for (const all of alike.values()) {
      for (let at = 0; at < all.length; at += MAX_BATCH) {
        const asks = all.slice(at, at + MAX_BATCH);
        const { queue, wish: { kind, ...options } } = asks[0]!;
        line.sent.push(asks);
        this.#say({ case: kind, value: { queue, leaseTokens: asks.map(({ token }) => token), ...options } });
      }
    }
  }

  /** Asks for no more tasks, and for an answer: what the server sent before is here when that is. */
  #hush(): void {
    this.#say({ case: "maxOutstanding", value: 0 });
    this.#askForWord();
  }

  #askForWord(): void {
    this.#speaking?.sent.push([]);
    this.#say({ case: "heartbeat", value: { queue: this.#open.queues[0]!.name, leaseTokens: [NO_TOKEN] } });
  }

  #say(request: Request): void {
    this.#speaking?.call.write({ request });
  }

  #answered({ token, wish }: Ask, outcome: Outcome): void {
    const held = this.#held.get(token);
    this.#held.delete(token);
    if (!held || wish.kind !== "ack") return;
    const isLost = outcome === Outcome.LEASE_LOST;
    this.stats[isLost ? "lost" : "acked"] += 1;
    this.#call(() => (isLost ? this.#options.onLost : this.#options.onAcked)?.(held.task));
  }

  #broke(line: Line, { code, details, metadata }: StatusObject): void {
    if (!this.#lines.delete(line)) return;
    line.client.close();
    // What was not answered is said again, before what came later.
    this.#asks.unshift(...line.sent.flat());
    if (line === this.#speaking) this.#speaking = undefined;
    if (this.#asks.length > 0 && this.#speaking) this.#flush ??= setImmediate(() => this.#flushAsks());
    if (this.#state === "closing") return this.#end();
    // A stream that was replaced, or is about to be, has no more to say.
    if (line !== this.#newest || this.#reconnect || this.#state === "ended") return;
    const error = code === 0
      ? new DataQueueError("UNAVAILABLE", "the server ended the stream")
      : DataQueueError.from({ code, details, metadata });
    // The session is this worker's alone: it was a stream of its own that was thought dead and came late. Once.
    const isTakenOver = error.reason === "SESSION_TAKEN_OVER";
    const helps = isTakenOver && !this.#wasTakenOver;
    this.#wasTakenOver ||= isTakenOver;
    if (!helps && !error.isTransient && error.code !== "INTERNAL") return this.#end(error);
    this.#call(() => this.#options.onDisconnected?.(error));
    if (this.#endIfSettled()) return;
    this.#connectIn(this.#backoff.pause() + (error.retryAfterMs ?? 0));
  }

  #connectIn(pauseMs: number): void {
    this.#reconnect ??= setTimeout(() => {
      this.#reconnect = undefined;
      this.#connect();
    }, pauseMs);
  }

  /** Ends a worker that stops when no handler's task is open: at once if all is answered, else when the answers are here or late. */
  #endIfSettled(): boolean {
    if (this.#state !== "stopping") return false;
    for (const held of this.#held.values()) if (!held.wish) return false;
    this.#lastAnswers ??= setTimeout(() => this.#end(), LAST_ANSWERS_MS);
    const isAnswered = this.#held.size === 0 && this.#asks.length === 0 && [...this.#lines].every(({ sent }) => sent.length === 0);
    // The server may have sent tasks on a stream that is about to be open.
    if (!isAnswered || (!this.#speaking && this.#lines.size > 0)) return false;
    if (this.#speaking) {
      this.#state = "closing";
      this.#speaking.call.end();
    } else {
      this.#end();
    }
    return true;
  }

  #end(error?: DataQueueError): void {
    if (this.#state === "ended") return;
    for (const held of this.#held.values()) this.#abort(held, error ? "lost" : "stopped");
    this.#state = "ended";
    this.#waiting = [];
    for (const timer of [this.#reconnect, this.#grace, this.#lastAnswers]) clearTimeout(timer);
    for (const line of this.#lines) {
      line.call.cancel();
      line.client.close();
    }
    if (error) this.#finish.reject(error);
    else this.#finish.resolve();
  }

  /** A hook that throws is a bug of its owner's, and shown as one; it does not keep the worker from its work. */
  #call(hook: () => void): void {
    try {
      hook();
    } catch (error) {
      queueMicrotask(() => { throw error; });
    }
  }
}

function taskOf(message: TaskMessage): Task {
  const { id, queue, leaseToken, md5, headers, deliveries, failures, expiries, priority, value, insertedAt } = message;
  const payload = value.case === "json" ? { json: value.value } : { data: value.value ?? new Uint8Array() };
  return {
    id, queue, leaseToken, ...payload, md5, headers, deliveries, failures, expiries, priority,
    insertedAt: insertedAt ? timestampDate(insertedAt) : new Date(0),
  };
}

/** The error's text within the bytes that a reason may have, not cut within a character. */
function reasonOf(error: unknown): string {
  let text: string;
  try {
    text = String(error instanceof Error ? error.message || error.name : error);
  } catch {
    text = "what was thrown has no text";
  }
  const bytes = Buffer.from(text);
  let end = Math.min(bytes.length, MAX_REASON_BYTES);
  while (end < bytes.length && (bytes[end]! & 0xc0) === 0x80) end -= 1;
  return bytes.toString("utf8", 0, end);
}
