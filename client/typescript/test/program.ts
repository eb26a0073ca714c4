// What the project's checks run: the scenario that every client runs, and a worker that tells what it does.
import { createHash, randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import {
  connect, DataQueue, DataQueueError, Outcome, Producer, QueueAdmin, Reject, stub, TaskState, Worker, type Task,
} from "../src/index.js";

type Step = Record<string, any>;

function say(line: string): void {
  process.stdout.write(`${line}\n`);
}

function need(holds: boolean, what: string): asserts holds {
  if (!holds) throw new Error(what);
}

function same(got: unknown, expected: unknown, what: string): void {
  const [a, b] = [JSON.stringify(got), JSON.stringify(expected)];
  need(a === b, `${what}: ${a}, expected ${b}`);
}

class Scenario {
  readonly #ids = new Map<string, string>();
  readonly #inputs = new Map<string, Step>();
  readonly #tokens = new Map<string, string[]>();
  readonly #client;
  readonly #data;
  readonly #admin;

  constructor(readonly address: string) {
    this.#client = connect(address);
    this.#data = stub(DataQueue, this.#client);
    this.#admin = stub(QueueAdmin, this.#client);
  }

  close(): void {
    this.#client.close();
  }

  async run(step: Step, queue: string): Promise<void> {
    const expected = step["expect"]?.error;
    try {
      const does = (this as unknown as Record<string, (step: Step, queue: string) => Promise<void>>)[step["do"]];
      need(does !== undefined, "no such step");
      await does.call(this, step, queue);
    } catch (error) {
      if (!expected || !(error instanceof DataQueueError)) throw error;
      for (const part of Object.keys(expected)) same((error as unknown as Step)[part], expected[part], part);
      return;
    }
    need(!expected, "it was not refused");
  }

  async insert(step: Step, queue: string): Promise<void> {
    const tasks = step["tasks"].map((task: Step) => ({
      value: task["json"] !== undefined ? { case: "json", value: task["json"] } : { case: "data", value: Buffer.from(task["data"], "base64") },
      headers: task["headers"] ?? {},
    }));
    const { results, replayed } = await this.#data.insert({ queue, tasks, requestId: step["request_id"] ?? "" });
    if (step["expect"]?.replayed !== undefined) same(replayed, step["expect"].replayed, "replayed");
    (step["names"] ?? []).forEach((name: string, i: number) => {
      const id = results[i]?.id;
      need(id !== undefined, "an id is missing");
      same(id, this.#ids.get(name) ?? id, `the id of ${name}`);
      this.#ids.set(name, id);
      this.#inputs.set(name, step["tasks"][i]);
    });
  }

  async pop(step: Step, queue: string): Promise<void> {
    const { task } = await this.#data.pop({ queue, ...times(step) });
    this.#popped(step, task ? [task] : []);
  }

  async pop_batch(step: Step, queue: string): Promise<void> {
    const tasks = [];
    for await (const message of this.#data.popBatch({ queue, maxTasks: step["max_tasks"], ...times(step) })) tasks.push(...message.tasks);
    this.#popped(step, tasks);
  }

  #popped(step: Step, tasks: { id: string; leaseToken: string; deliveries: number; headers: Step; value: { case?: string | undefined; value?: unknown } }[]): void {
    const names = tasks.map(({ id }) => [...this.#ids].find(([, known]) => known === id)?.[0]);
    same(names, step["expect"].tasks, "tasks");
    if (step["expect"].deliveries) same(tasks.map(({ deliveries }) => deliveries), step["expect"].deliveries, "deliveries");
    tasks.forEach((task, i) => {
      const name = names[i]!;
      const input = this.#inputs.get(name)!;
      const got = task.value.case === "json" ? { json: task.value.value } : { data: Buffer.from(task.value.value as Uint8Array).toString("base64") };
      same(got, input["json"] !== undefined ? { json: input["json"] } : { data: input["data"] }, `the value of ${name}`);
      same(Object.entries(task.headers).sort(), Object.entries(input["headers"] ?? {}).sort(), `the headers of ${name}`);
      this.#tokens.set(name, [...(this.#tokens.get(name) ?? []), task.leaseToken]);
    });
  }

  #leaseTokens(step: Step): string[] {
    const back = step["stale"] ? -2 : -1;
    return (step["stale"] ?? step["tasks"]).map((name: string) => this.#tokens.get(name)!.at(back)!);
  }

  async heartbeat(step: Step, queue: string): Promise<void> {
    outcomes(step, (await this.#data.heartbeat({ queue, leaseTokens: this.#leaseTokens(step), ...times(step) })).outcomes);
  }

  async ack(step: Step, queue: string): Promise<void> {
    outcomes(step, (await this.#data.ack({ queue, leaseTokens: this.#leaseTokens(step) })).outcomes);
  }

  async putback(step: Step, queue: string): Promise<void> {
    const tokens = {
      leaseTokens: this.#leaseTokens(step),
      delay: step["delay"] === undefined ? undefined : durationFromMs(step["delay"]),
      reason: step["reason"] ?? "",
      failed: step["failed"] ?? false,
      deadLetter: step["dead_letter"] ?? false,
    };
    outcomes(step, (await this.#data.putback({ queue, selection: { case: "tokens", value: tokens } })).outcomes);
  }

  async counts(step: Step, queue: string): Promise<void> {
    for (const until = Date.now() + 10_000; ;) {
      const counts = (await this.#admin.getQueue({ queue })).queue?.counts as unknown as Record<string, bigint>;
      const got = Object.fromEntries(Object.keys(step["expect"]).map((name) => [name, Number(counts[name])]));
      if (JSON.stringify(got) === JSON.stringify(step["expect"])) return;
      if (Date.now() > until) same(got, step["expect"], "counts");
      await sleep(50);
    }
  }

  async dead(step: Step, queue: string): Promise<void> {
    const { tasks } = await this.#admin.listTasks({ queue, state: TaskState.DEAD });
    same(tasks.map(({ task }) => task?.id), step["expect"].tasks.map((name: string) => this.#ids.get(name)), "dead letters");
    same(tasks.map(({ lastError }) => lastError), step["expect"].reasons, "reasons");
  }

  async consume(step: Step, queue: string): Promise<void> {
    const { count, concurrency, fail = [], reject = [], expect } = step as Step & { count: number; concurrency: number };
    const producer = new Producer({ address: this.address });
    await producer.insert(queue, Array.from({ length: count }, (_, n) => ({ json: `{"n": ${n}}` })));
    producer.close();
    let [running, most, handled, failed, rejected] = [0, 0, 0, 0, 0];
    const wrong: string[] = [];
    await worked(this.address, queue, concurrency, async (task) => {
      const { n } = JSON.parse(task.json!);
      most = Math.max(most, ++running);
      await sleep(5);
      running -= 1;
      if (reject.includes(n)) {
        rejected += 1;
        throw new Reject("not wanted");
      }
      if (fail.includes(n) && task.failures === 0) {
        failed += 1;
        throw new Error("as asked");
      }
      if (fail.includes(n) && task.failures !== 1) wrong.push(`${n} failed ${task.failures} times`);
      handled += 1;
    }, () => handled + rejected >= count);
    same({ handled, failed, rejected }, expect, "handlers");
    same(wrong, [], "failures");
    need(most > 1 && most <= concurrency, `${most} handlers at once`);
  }

  async reconnect(step: Step, queue: string): Promise<void> {
    const { count, concurrency, restart_after } = step as Step & { count: number; concurrency: number };
    const producer = new Producer({ address: this.address });
    const acked = new Set<number>();
    let handled = 0;
    const inserts = (async () => {
      for (let n = 0; n < count; n += 1) await producer.insert(queue, { json: `{"n": ${n}}` });
    })();
    inserts.catch(() => {});
    await worked(this.address, queue, concurrency, async () => {
      await sleep(1);
      handled += 1;
      if (handled === restart_after) say("restart");
    }, () => acked.size === count, (task) => acked.add(JSON.parse(task.json!).n));
    await inserts;
    producer.close();
    same(acked.size, step["expect"].handled, "handled");
  }
}

/** Runs a worker until `isDone`, for a minute and a half at the most. */
async function worked(address: string, queue: string, concurrency: number, handle: (task: Task) => Promise<void>, isDone: () => boolean, onAcked?: (task: Task) => void) {
  const worker = new Worker({ address, queues: [queue], concurrency, ...(onAcked && { onAcked }) }, handle);
  const run = worker.run();
  const watch = (async () => {
    for (const until = Date.now() + 90_000; !isDone();) {
      need(Date.now() < until, `not all was handled in 90 s: ${JSON.stringify(worker.stats)}`);
      await sleep(20);
    }
  })();
  try {
    await Promise.race([watch, run]);
  } finally {
    await worker.stop();
  }
}

function times(step: Step) {
  return {
    lease: step["lease"] === undefined ? undefined : durationFromMs(step["lease"]),
    wait: step["wait"] === undefined ? undefined : durationFromMs(step["wait"]),
  };
}

function outcomes(step: Step, got: Outcome[]): void {
  same(got.map((outcome) => Outcome[outcome]), step["expect"].outcomes, "outcomes");
}

async function scenario(address: string, file: string, prefix: string): Promise<void> {
  const { steps } = JSON.parse(readFileSync(file, "utf8")) as { steps: Step[] };
  const run = new Scenario(address);
  for (const [i, step] of steps.entries()) {
    const name = `${i + 1} ${step["do"]} ${step["queue"]}`;
    try {
      await run.run(step, `${prefix}-${step["queue"]}`);
    } catch (error) {
      say(`failed ${name}: ${error instanceof Error ? error.message : error}`);
      process.exitCode = 1;
      break;
    }
    say(`ok ${name}`);
  }
  run.close();
}

async function work(address: string, queue: string, options: { concurrency: number; failEvery: number; hold: number; grace: number }): Promise<void> {
  let deliveries = 0;
  const worker = new Worker({
    address,
    queues: [queue],
    concurrency: options.concurrency,
    graceMs: options.grace,
    onAcked: (task) => say(`acked ${task.id} ${task.leaseToken}`),
    onLost: (task) => say(`lost ${task.id} ${task.leaseToken}`),
    onDisconnected: (error) => console.error(error.message),
  }, async (task, { signal }) => {
    deliveries += 1;
    const fails = options.failEvery > 0 && deliveries % options.failEvery === 0;
    say(`delivered ${task.id} ${task.leaseToken} ${createHash("md5").update(task.json ?? task.data!).digest("hex")}`);
    if (options.hold > 0) await sleep(options.hold, undefined, { signal });
    if (fails) throw new Error("as asked");
  });
  for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => void worker.stop());
  await worker.run();
  say("stopped");
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    addr: { type: "string", default: "127.0.0.1:50051" },
    file: { type: "string" },
    prefix: { type: "string", default: randomUUID() },
    queue: { type: "string" },
    concurrency: { type: "string", default: "16" },
    "fail-every": { type: "string", default: "0" },
    hold: { type: "string", default: "0" },
    grace: { type: "string", default: "30000" },
  },
});
try {
  if (positionals[0] === "scenario" && values.file) await scenario(values.addr, values.file, values.prefix);
  else if (positionals[0] === "work" && values.queue) {
    await work(values.addr, values.queue, {
      concurrency: Number(values.concurrency), failEvery: Number(values["fail-every"]), hold: Number(values.hold), grace: Number(values.grace),
    });
    process.exitCode = 0;
  } else {
    console.error("usage: program scenario --addr A --file F --prefix P | work --addr A --queue Q [--concurrency N] [--fail-every N] [--hold MS] [--grace MS]");
    process.exitCode = 2;
  }
} catch (error) {
  console.error(error instanceof Error ? error.message : error);
  process.exitCode = 1;
}
