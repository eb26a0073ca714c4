import { spawn, type ChildProcess } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { once } from "node:events";
import { connect as dial, createServer, type AddressInfo, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { connect, DataQueue, QueueAdmin, stub } from "../src/index.js";

const BINARY = process.env["DATA_QUEUE_SERVER"] ?? fileURLToPath(new URL("../../../../target/debug/data-queue-server", import.meta.url));

/** A server of the test's own, with its tasks in a file of its own, on a port that it keeps over restarts. */
export class Server {
  readonly #dir = mkdtempSync(join(tmpdir(), "data-queue-"));
  #child: ChildProcess | undefined;

  private constructor(readonly address: string, readonly flags: string[]) {}

  /** One that is not started yet. */
  static async prepare(...flags: string[]): Promise<Server> {
    if (!existsSync(BINARY)) throw new Error(`no server at ${BINARY}: run cargo build -p data-queue-server, or set DATA_QUEUE_SERVER`);
    const listener = createServer().listen(0, "127.0.0.1");
    await once(listener, "listening");
    const { port } = listener.address() as AddressInfo;
    listener.close();
    await once(listener, "close");
    return new Server(`127.0.0.1:${port}`, flags);
  }

  static async start(...flags: string[]): Promise<Server> {
    const server = await Server.prepare(...flags);
    await server.start();
    return server;
  }

  async start(): Promise<void> {
    const args = ["--listen", this.address, "--data-dir", this.#dir, "--log-level", "error", ...this.flags];
    const child = spawn(BINARY, args, { stdio: ["ignore", "pipe", "inherit"] });
    this.#child = child;
    for await (const line of createInterface(child.stdout)) if (line.startsWith("listening on")) return;
    throw new Error("the server did not start");
  }

  async kill(): Promise<void> {
    await this.#end("SIGKILL");
  }

  async end(): Promise<void> {
    await this.#end("SIGKILL");
    rmSync(this.#dir, { recursive: true });
  }

  /** Stops as an operator stops it, by drain. */
  async terminate(): Promise<void> {
    await this.#end("SIGTERM");
  }

  async #end(signal: NodeJS.Signals): Promise<void> {
    const child = this.#child;
    this.#child = undefined;
    if (child && child.exitCode === null && child.kill(signal)) await once(child, "exit");
  }

  /** The generated calls, for a while. */
  async ask<T>(use: (data: ReturnType<typeof stub<typeof DataQueue>>, admin: ReturnType<typeof stub<typeof QueueAdmin>>) => Promise<T>): Promise<T> {
    const client = connect(this.address);
    try {
      return await use(stub(DataQueue, client), stub(QueueAdmin, client));
    } finally {
      client.close();
    }
  }

  async counts(queue: string): Promise<Record<string, number>> {
    const { counts } = (await this.ask((_, admin) => admin.getQueue({ queue }))).queue!;
    return Object.fromEntries(Object.entries(counts!).map(([name, count]) => [name, Number(count)]));
  }
}

/** A way to a server on which bytes can be changed or swallowed. */
export class Wire {
  readonly #near = new Set<Socket>();
  readonly #listener;
  /** How many connections there were. */
  connections = 0;
  readonly #silent = new WeakSet<Socket>();

  private constructor(server: Server, change: (bytes: string) => string) {
    const [host, port] = server.address.split(":");
    this.#listener = createServer((near) => {
      this.connections += 1;
      this.#near.add(near);
      const far = dial(Number(port), host);
      for (const socket of [near, far]) {
        socket.on("error", () => {});
        socket.on("close", () => [near, far].forEach((socket) => socket.destroy()));
      }
      near.on("data", (bytes) => this.#silent.has(near) || far.write(bytes));
      far.on("data", (bytes) => this.#silent.has(near) || near.write(Buffer.from(change(bytes.toString("latin1")), "latin1")));
    });
  }

  static async to(server: Server, change: (bytes: string) => string = (bytes) => bytes): Promise<Wire> {
    const wire = new Wire(server, change);
    wire.#listener.listen(0, "127.0.0.1");
    await once(wire.#listener, "listening");
    return wire;
  }

  get address(): string {
    return `127.0.0.1:${(this.#listener.address() as AddressInfo).port}`;
  }

  /** The connections that are open now carry nothing more. */
  fallSilent(): void {
    for (const near of this.#near) this.#silent.add(near);
  }

  end(): void {
    this.#listener.close();
    for (const near of this.#near) near.destroy();
  }
}

/** Waits until something holds, for half a minute at the most. */
export async function until(what: string, holds: () => boolean | Promise<boolean>): Promise<void> {
  for (const end = Date.now() + 30_000; !(await holds());) {
    if (Date.now() > end) throw new Error(`not in 30 s: ${what}`);
    await sleep(10);
  }
}
