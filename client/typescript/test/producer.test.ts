import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { DataQueueError, Producer } from "../src/index.js";
import { Server, until } from "./server.js";

let server: Server;
let producer: Producer;

before(async () => {
  server = await Server.start();
  producer = new Producer({ address: server.address });
});

after(async () => {
  producer.close();
  await server.end();
});

test("an insert is repeated over a restart, and inserts once", async () => {
  const own = await Server.start();
  const inserts = new Producer({ address: own.address });
  try {
    await inserts.insert("once", { json: "0" });
    let [done, isOver] = [1, false];
    const work = (async () => {
      for (; !isOver; done += 1) await inserts.insert("once", { json: String(done) });
    })();
    for (const count of [20, 60]) {
      await until(`${count} inserts`, () => done >= count);
      await own.kill();
      await own.start();
    }
    await until("inserts go on", () => done >= 100);
    isOver = true;
    await work;
    assert.equal((await own.counts("once"))["inserted"], done);
  } finally {
    inserts.close();
    await own.end();
  }
});

test("the same request id inserts once, and a refusal is thrown at once with reason and field", async () => {
  const first = await producer.insert("refused", [{ json: "1" }], { requestId: "r" });
  const again = await producer.insert("refused", [{ json: "1" }], { requestId: "r" });
  assert.deepEqual([again.results[0]!.id, first.replayed, again.replayed], [first.results[0]!.id, false, true]);
  await assert.rejects(producer.insert("refused", [{ json: "1" }, { json: "{" }]), (error: DataQueueError) => {
    assert.deepEqual([error.code, error.reason, error.field], ["INVALID_ARGUMENT", "JSON_INVALID", "tasks[1].json"]);
    assert.ok(error.message.startsWith("INVALID_ARGUMENT JSON_INVALID at tasks[1].json: "), error.message);
    return true;
  });
});

test("a queue that is full is tried again until there is room, or the time is over", async () => {
  const queue = "full";
  const settings = (maxTasks: bigint) =>
    server.ask((_, admin) => admin.updateQueue({ queue, settings: { maxTasks }, updateMask: { paths: ["max_tasks"] } }));
  await settings(0n);
  await assert.rejects(producer.insert(queue, { json: "1" }, { timeoutMs: 300 }), { reason: "QUEUE_FULL" });
  const waits = producer.insert(queue, { json: "1" });
  await settings(1n);
  assert.equal((await waits).results.length, 1);
});

test("a server that is away is tried until the time is over", async () => {
  const away = await Server.prepare();
  const inserts = new Producer({ address: away.address, timeoutMs: 300 });
  await assert.rejects(inserts.insert("a", { json: "1" }), { code: "UNAVAILABLE" });
  inserts.close();
  await away.end();
});

test("a batch inserts what is added in its order, few calls for many tasks, and tells each its id", async () => {
  const queue = "batch";
  const batch = producer.batch(queue, { maxTasks: 100, maxInFlight: 1 });
  const results = [];
  for (let n = 0; n < 1_050; n += 1) results.push((await batch.add({ json: String(n), ...(n < 2 && { uniqueKey: "u" }) })).result);
  await batch.close();
  const added = await Promise.all(results);
  assert.deepEqual(added.slice(0, 3).map(({ duplicate }) => duplicate), [false, true, false]);
  assert.equal(added[0]!.id, added[1]!.id);
  assert.equal(new Set(added.map(({ id }) => id)).size, 1_049);
  const popped: string[] = [];
  await server.ask(async (data) => {
    for await (const { tasks } of data.popBatch({ queue, maxTasks: 2_000 })) popped.push(...tasks.map(({ value }) => value.value as string));
  });
  assert.deepEqual(popped.map(Number), Array.from({ length: 1_050 }, (_, n) => n).filter((n) => n !== 1));
  await assert.rejects(batch.add({ json: "1" }), /closed/);
});

test("a task alone does not wait for others longer than the linger", async () => {
  const batch = producer.batch("linger");
  const { result } = await batch.add({ json: "1" });
  assert.ok((await result).id);
});

test("a batch of 1 MiB tasks stays below the largest message", async () => {
  const batch = producer.batch("large");
  for (let n = 0; n < 8; n += 1) await batch.add({ data: Buffer.alloc(900_000) });
  await batch.close();
  assert.equal((await server.counts("large"))["ready"], 8);
});

test("a batch that is refused tells its tasks, and flush", async () => {
  const batch = producer.batch("bad");
  const { result } = await batch.add({ json: "{" });
  await assert.rejects(batch.flush(), { reason: "JSON_INVALID" });
  await assert.rejects(result, { reason: "JSON_INVALID" });
  await batch.close();
});
