import assert from "node:assert/strict";
import { once } from "node:events";
import { after, before, test } from "node:test";
import { DataQueueError, Producer, Reject, TaskState, Worker, type Handler, type Task, type WorkerOptions } from "../src/index.js";
import { Server, until, Wire } from "./server.js";

let server: Server;
let producer: Producer;

before(async () => {
  server = await Server.start("--backoff-min", "50ms", "--backoff-max", "50ms");
  producer = new Producer({ address: server.address });
});

after(async () => {
  producer.close();
  await server.end();
});

/** Runs a worker while `watch` waits, and stops it. */
async function working(options: Partial<WorkerOptions> & { queues: string[] }, handler: Handler, watch: (worker: Worker) => Promise<unknown>): Promise<Worker> {
  const worker = new Worker({ address: server.address, ...options }, handler);
  const run = worker.run();
  try {
    await Promise.race([watch(worker), run]);
  } finally {
    await worker.stop();
  }
  await run;
  return worker;
}

function numbers(count: number) {
  return Array.from({ length: count }, (_, n) => ({ json: `{"n": ${n}}` }));
}

function n(task: Task): number {
  return JSON.parse(task.json!).n;
}

test("what a handler returns from is acked, what it throws at comes again, what it rejects is a dead letter", async () => {
  const queue = "outcomes";
  await producer.insert(queue, numbers(3));
  const seen: [number, number][] = [];
  const worker = await working({ queues: [queue] }, async (task) => {
    seen.push([n(task), task.failures]);
    if (n(task) === 1 && task.failures === 0) throw new Error("not yet");
    if (n(task) === 2) throw new Reject("never");
  }, () => until("all done", async () => (await server.counts(queue))["acked"] === 2 && (await server.counts(queue))["dead"] === 1));
  assert.deepEqual(seen.sort(), [[0, 0], [1, 0], [1, 1], [2, 0]]);
  assert.deepEqual(worker.stats, { acked: 2, failed: 1, rejected: 1, lost: 0 });
  const { tasks } = await server.ask((_, admin) => admin.listTasks({ queue, state: TaskState.DEAD }));
  assert.deepEqual(tasks.map(({ lastError }) => lastError), ["never"]);
});

test("values, headers and counters arrive as they were inserted", async () => {
  const queue = "values";
  const text = '{"big": 12345678901234567890, "é": "\\u00e9 😀"}';
  await producer.insert(queue, [{ json: text, headers: { "é": "ü" }, priority: 3 }, { data: Buffer.from([0, 255]) }, { data: new Uint8Array() }]);
  const seen: Task[] = [];
  await working({ queues: [queue], concurrency: 1 }, async (task) => void seen.push(task), () => until("all seen", () => seen.length === 3));
  assert.equal(seen[0]!.json, text);
  assert.deepEqual({ ...seen[0]!.headers }, { "é": "ü" });
  assert.deepEqual([seen[0]!.priority, seen[0]!.deliveries, seen[0]!.failures], [3, 1, 0]);
  assert.deepEqual(seen.slice(1).map(({ data }) => [...data!]), [[0, 255], []]);
});

test("a reason is cut at 1,024 bytes and not within a character", async () => {
  const queue = "reasons";
  await producer.insert(queue, numbers(1));
  await working({ queues: [queue] }, () => { throw new Reject("x" + "é".repeat(600)); },
    () => until("dead", async () => (await server.counts(queue))["dead"] === 1));
  const { tasks } = await server.ask((_, admin) => admin.listTasks({ queue, state: TaskState.DEAD }));
  assert.equal(tasks[0]!.lastError, "x" + "é".repeat(511));
});

test("what is thrown may be anything", async () => {
  const queue = "anything";
  await producer.insert(queue, numbers(3));
  const thrown = [Object.create(null), undefined, Object.assign(new Error(), { message: 5 })];
  const failures: unknown[] = [];
  await working({ queues: [queue], onFailed: (_, error) => failures.push(error) }, async (task) => {
    if (task.failures === 0) throw thrown[n(task)];
  }, () => until("acked", async () => (await server.counts(queue))["acked"] === 3));
  assert.equal(failures.length, 3);
});

test("a handler past its deadline is aborted and has failed, even if it returns", async () => {
  const queue = "deadline";
  await producer.insert(queue, numbers(1));
  const failures: string[] = [];
  await working({ queues: [queue], deadlineMs: 50, onFailed: (_, error) => failures.push((error as Error).message) }, async (task, { signal }) => {
    if (task.failures === 0) await once(signal, "abort");
  }, () => until("acked", async () => (await server.counts(queue))["acked"] === 1));
  assert.deepEqual(failures, ["deadline of 0.05 s passed"]);
});

test("no more handlers run at once than `concurrency`, and a slow one does not hold up the others", async () => {
  const queue = "concurrency";
  await producer.insert(queue, numbers(50));
  let [running, most, done] = [0, 0, 0];
  let release = () => {};
  const slow = new Promise<void>((resolve) => (release = resolve));
  await working({ queues: [queue], concurrency: 4 }, async (task) => {
    most = Math.max(most, ++running);
    await (n(task) === 0 ? slow : new Promise(setImmediate));
    running -= 1;
    done += 1;
  }, async () => {
    await until("the others done", () => done === 49);
    release();
    await until("all done", () => done === 50);
  });
  assert.equal(most, 4);
});

test("a task that is deleted aborts its handler, and is gone", async () => {
  const queue = "cancel";
  const { results } = await producer.insert(queue, numbers(2));
  const aborted: string[] = [];
  let begun = 0;
  await working({ queues: [queue], leaseMs: 600 }, async (task, { signal }) => {
    begun += 1;
    await once(signal, "abort");
    aborted.push((signal.reason as Error).message);
    if (n(task) === 1) throw signal.reason;
  }, async () => {
    await until("begun", () => begun === 2);
    await server.ask((_, admin) => admin.deleteTasks({ queue, ids: results.map(({ id }) => id) }));
    await until("gone", async () => {
      const { ready, leased, scheduled } = await server.counts(queue);
      return aborted.length === 2 && ready! + leased! + scheduled! === 0;
    });
  });
  assert.deepEqual(aborted, ["the task was deleted", "the task was deleted"]);
  const { acked, dead } = await server.counts(queue);
  assert.deepEqual([acked, dead, begun], [1, 0, 2]);
});

test("a value that was damaged on its way is not handled, and is put back with a reason that says so", async () => {
  const queue = "damaged";
  await producer.insert(queue, { data: Buffer.from("the value as it was inserted") });
  const wire = await Wire.to(server, (bytes) => bytes.replace("as it was", "as it wAs"));
  let handled = 0;
  const failures: string[] = [];
  await working({ queues: [queue], address: wire.address, onFailed: (_, error) => failures.push((error as Error).message) }, () => void (handled += 1),
    () => until("failed", () => failures.length >= 1));
  wire.end();
  assert.equal(handled, 0);
  assert.match(failures[0]!, /^the value arrived damaged: its md5 is/);
});

test("a worker may be started before its server", async () => {
  const late = await Server.prepare();
  try {
    let [handled, refused] = [0, 0];
    await working({ address: late.address, queues: ["early"], onDisconnected: () => (refused += 1) }, () => void (handled += 1), async () => {
      await until("refused", () => refused >= 2);
      await late.start();
      const inserts = new Producer({ address: late.address });
      await inserts.insert("early", numbers(1));
      inserts.close();
      await until("handled", () => handled === 1);
    });
    assert.equal((await late.counts("early"))["acked"], 1);
  } finally {
    await late.end();
  }
});

for (const how of ["kill", "terminate"] as const) {
  test(`over a server restart (${how}) nothing is lost, and nothing is acked that did not finish`, async () => {
    const own = await Server.start("--backoff-min", "50ms", "--backoff-max", "50ms", "--grace", "1s");
    const inserts = new Producer({ address: own.address });
    try {
      const queue = "restart";
      const finished = new Set<string>();
      const acked = new Set<number>();
      const unfinished: string[] = [];
      await inserts.insert(queue, numbers(300));
      await working({
        address: own.address, queues: [queue], concurrency: 16,
        onAcked: (task) => {
          acked.add(n(task));
          if (!finished.has(task.leaseToken)) unfinished.push(task.leaseToken);
        },
      }, async (task) => {
        await new Promise((resolve) => setTimeout(resolve, 5));
        if (task.failures === 0 && n(task) % 20 === 0) throw new Error("as asked");
        finished.add(task.leaseToken);
      }, async () => {
        for (const count of [50, 150]) {
          await until(`${count} acked`, () => acked.size >= count);
          await own[how]();
          await own.start();
        }
        await until("all acked", () => acked.size === 300);
      });
      assert.deepEqual(unfinished, []);
      const { ready, scheduled, leased, dead, acked: counted } = await own.counts(queue);
      assert.deepEqual([ready, scheduled, leased, dead, counted], [0, 0, 0, 0, 300]);
    } finally {
      inserts.close();
      await own.end();
    }
  });
}

test("a handler that outlives its server's restart acks with the token it has", async () => {
  const own = await Server.start();
  const inserts = new Producer({ address: own.address });
  try {
    await inserts.insert("outlives", numbers(1));
    let release = () => {};
    const released = new Promise<void>((resolve) => (release = resolve));
    let [begun, refused] = [0, 0];
    const worker = await working({ address: own.address, queues: ["outlives"], onDisconnected: () => (refused += 1) }, async () => {
      begun += 1;
      await released;
    }, async (worker) => {
      await until("begun", () => begun === 1);
      await own.kill();
      await until("noticed", () => refused >= 1);
      release();
      await own.start();
      await until("acked", () => worker.stats.acked === 1);
    });
    assert.deepEqual([begun, worker.stats.lost], [1, 0]);
  } finally {
    inserts.close();
    await own.end();
  }
});

test("a stream that the server tells to drain is replaced, and what is held stays with its handler", async () => {
  const own = await Server.start("--max-stream-age", "1s");
  const wire = await Wire.to(own);
  const inserts = new Producer({ address: own.address });
  try {
    const deliveries: number[] = [];
    const broke: string[] = [];
    let aborted = 0;
    await inserts.insert("drain", numbers(8));
    const worker = await working({
      address: wire.address, queues: ["drain"], concurrency: 4, onDisconnected: (error) => broke.push(error.message),
    }, async (task, { signal }) => {
      deliveries.push(task.deliveries);
      signal.addEventListener("abort", () => (aborted += 1));
      await until("the third stream", () => wire.connections >= 3);
    }, (worker) => until("all acked", () => worker.stats.acked === 8));
    assert.deepEqual([deliveries, aborted, worker.stats.lost, broke], [Array(8).fill(1), 0, 0, []]);
  } finally {
    inserts.close();
    wire.end();
    await own.end();
  }
});

test("a connection that has gone silent is noticed, and another one takes over what is held", async () => {
  const queue = "silent";
  const wire = await Wire.to(server);
  await producer.insert(queue, numbers(2));
  let aborted = 0;
  const deliveries: number[] = [];
  const worker = await working({ address: wire.address, queues: [queue], concurrency: 2 }, async (task, { signal }) => {
    deliveries.push(task.deliveries);
    signal.addEventListener("abort", () => (aborted += 1));
    if (deliveries.length === 2) wire.fallSilent();
    await until("the second stream", () => wire.connections === 2);
  }, (worker) => until("acked", () => worker.stats.acked === 2));
  wire.end();
  assert.deepEqual([deliveries, aborted, worker.stats], [[1, 1], 0, { acked: 2, failed: 0, rejected: 0, lost: 0 }]);
});

test("an ack after the lease was lost is no ack: the task is delivered again", async () => {
  const queue = "lost";
  await producer.insert(queue, numbers(1));
  const lost: string[] = [];
  const tokens: string[] = [];
  const worker = await working({ queues: [queue], onLost: (task) => lost.push(task.leaseToken) }, async (task) => {
    tokens.push(task.leaseToken);
    if (task.deliveries === 1) {
      await server.ask((data) => data.putback({ queue, selection: { case: "heldFor", value: {} } }));
    }
  }, (worker) => until("acked", () => worker.stats.acked === 1));
  assert.deepEqual([lost, worker.stats.lost, tokens.length], [[tokens[0]], 1, 2]);
});

test("stopping over and over costs no task an expiry, and loses none", async () => {
  const queue = "over and over".replaceAll(" ", "-");
  await producer.insert(queue, numbers(1_000));
  let expiries = 0;
  const acked = new Set<number>();
  for (let goal = 50; goal <= 1_000; goal += 50) {
    await working({ queues: [queue], concurrency: 8, onAcked: (task) => acked.add(n(task)) }, (task) => void (expiries += task.expiries),
      () => until(`${goal} acked`, () => acked.size >= goal));
  }
  const { leased, ready, acked: counted } = await server.counts(queue);
  assert.deepEqual([expiries, leased, ready, counted], [0, 0, 0, 1_000]);
});

test("stop lets handlers finish, and gives back what is not begun", async () => {
  const queue = "stop";
  await producer.insert(queue, numbers(10));
  let begun = 0;
  let release = () => {};
  const released = new Promise<void>((resolve) => (release = resolve));
  const worker = new Worker({ address: server.address, queues: [queue], concurrency: 4 }, async () => {
    begun += 1;
    await released;
  });
  const run = worker.run();
  await until("begun", () => begun === 4);
  const stopped = worker.stop();
  release();
  await Promise.all([run, stopped]);
  const { ready, leased, acked } = await server.counts(queue);
  assert.deepEqual([ready, leased, acked, begun], [6, 0, 4, 4]);
});

test("after the grace the running handlers are aborted, and their tasks go back uncounted, even if they return later", async () => {
  const queue = "grace";
  await producer.insert(queue, numbers(2));
  let begun = 0;
  let release = () => {};
  const released = new Promise<void>((resolve) => (release = resolve));
  const reasons: string[] = [];
  const worker = new Worker({ address: server.address, queues: [queue], graceMs: 50 }, async (_, { signal }) => {
    begun += 1;
    signal.addEventListener("abort", () => reasons.push(signal.reason.message));
    await released;
  });
  const run = worker.run();
  await until("begun", () => begun === 2);
  await worker.stop();
  release();
  await run;
  const { ready, leased, acked } = await server.counts(queue);
  assert.deepEqual([ready, leased, acked, reasons], [2, 0, 0, ["the worker stops", "the worker stops"]]);
  const { task } = await server.ask((data) => data.pop({ queue }));
  assert.deepEqual([task!.failures, task!.expiries, task!.deliveries], [0, 0, 2]);
});

test("a worker that stops while its connection is silent ends before that is noticed", async () => {
  const queue = "silent-stop";
  const wire = await Wire.to(server);
  await producer.insert(queue, numbers(1));
  const broke: string[] = [];
  let begun = 0;
  const worker = new Worker({ address: wire.address, queues: [queue], graceMs: 50, onDisconnected: (error) => broke.push(error.message) }, () => {
    begun += 1;
    return new Promise(() => {});
  });
  const run = worker.run();
  await until("begun", () => begun === 1);
  wire.fallSilent();
  await worker.stop();
  await run;
  wire.end();
  assert.deepEqual([broke, worker.stats.acked], [[], 0]);
});

test("a worker that stops while its server is away ends", async () => {
  const own = await Server.start();
  const inserts = new Producer({ address: own.address });
  await inserts.insert("away", numbers(1));
  inserts.close();
  let begun = 0;
  const worker = new Worker({ address: own.address, queues: ["away"], graceMs: 0 }, () => {
    begun += 1;
    return new Promise(() => {});
  });
  const run = worker.run();
  await until("begun", () => begun === 1);
  await own.end();
  await worker.stop();
  await run;
  assert.equal(worker.stats.acked, 0);
});

test("an argument that the server refuses ends run with its reason and field", async () => {
  const worker = new Worker({ address: server.address, queues: ["twice", "twice"] }, () => {});
  await assert.rejects(worker.run(), (error: DataQueueError) => {
    assert.deepEqual([error.code, error.reason], ["INVALID_ARGUMENT", "CONSUME_INVALID"]);
    assert.match(error.field!, /^open\.queues/);
    assert.ok(error.message.startsWith(`INVALID_ARGUMENT CONSUME_INVALID at ${error.field}: `), error.message);
    return true;
  });
});

test("options that cannot be sent are refused by the constructor", () => {
  for (const options of [{ concurrency: 1.5 }, { deadlineMs: 2 ** 31 }, { graceMs: -1 }, { address: "nowhere" }, { address: "https://a:1" }]) {
    assert.throws(() => new Worker({ queues: ["a"], ...options }, () => {}));
  }
});
