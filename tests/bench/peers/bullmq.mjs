// BullMQ under the load that program.rs tells line by line: addBulk(500), and a Worker with a hundred jobs at once.

import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

const [modules, port] = process.argv.slice(2);
const require = createRequire(`${modules}/`);
const { Queue, Worker } = require('bullmq');

if (port === 'version') {
  console.log(`${process.versions.node} and ${require('bullmq/package.json').version}`);
  process.exit();
}

const NAME = 'bench';
const DIGITS = 12;
const connection = { host: '127.0.0.1', port: Number(port), maxRetriesPerRequest: null };
const queue = new Queue(NAME, { connection, defaultJobOptions: { removeOnComplete: true } });

const payload = (number, size) =>
  String(number).padStart(DIGITS, '0').padEnd(size, String.fromCharCode(97 + (number % 26)));

async function fill(first, count, size) {
  for (let next = first; next < first + count; next += 500) {
    const length = Math.min(500, first + count - next);
    await queue.addBulk(Array.from({ length }, (_, index) => ({ name: 't', data: payload(next + index, size) })));
  }
  return { inserted: count };
}

/** Done when so many jobs are completed, which BullMQ says when Redis has removed them. */
async function drain(count, size) {
  const delivered = [];
  let acked = 0;
  const work = async (job) => {
    const number = Number(job.data.slice(0, DIGITS));
    if (job.data !== payload(number, size)) throw new Error(`task ${number} came with another payload`);
    delivered.push(number);
  };
  const worker = new Worker(NAME, work, { connection, concurrency: 100 });
  await new Promise((resolve, reject) => {
    worker.on('completed', () => {
      acked += 1;
      if (acked === count) resolve();
    });
    worker.on('failed', (_, error) => reject(error));
    worker.on('error', reject);
  });
  closing.push(worker.close());
  return { delivered, acked };
}

// A worker takes its time to close; nothing waits for it but the next drain.
let closing = [];

async function left() {
  const counts = await queue.getJobCounts();
  return { left: Object.values(counts).reduce((sum, count) => sum + count, 0) };
}

for await (const line of createInterface({ input: process.stdin })) {
  const [command, ...words] = line.trim().split(' ');
  const answer = await { fill, drain, left }[command](...words.map(Number));
  console.log(JSON.stringify(answer));
  if (command !== 'drain') {
    await Promise.all(closing);
    closing = [];
  }
}
process.exit();
