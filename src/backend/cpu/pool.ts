/** The threads behind the cpu stream. Piscina starts, watches and stops them; the stream never talks to it per kernel. */
import { Piscina } from "piscina";
import type { WorkerTask } from "./worker.js";

const WORKER_FILE = new URL("./worker.js", import.meta.url).href;

export class WorkerPool {
  private readonly piscina: Piscina;
  private closing = false;
  private refs = false;
  /** True once every thread is in its loop. */
  running = false;

  /** @param onLost called once, when a thread ends or fails to start while the pool is in use */
  constructor(
    private readonly task: Omit<WorkerTask, "slot">,
    private readonly onLost: (reason: string, cause?: unknown) => void,
  ) {
    this.piscina = new Piscina({
      filename: WORKER_FILE,
      minThreads: task.threads,
      maxThreads: task.threads,
      concurrentTasksPerWorker: 1,
      idleTimeout: Number.POSITIVE_INFINITY,
      atomics: "disabled",
    });
    // The starting tasks hand the loops over; their errors and those of the threads end the pool the same way.
    this.piscina.on("error", (error) => this.lost("worker error", error));
  }

  async start(): Promise<void> {
    const { threads } = this.task;
    try {
      const ids: number[] = await Promise.all(
        Array.from({ length: threads }, (_, slot) => this.piscina.run({ ...this.task, slot })),
      );
      if (new Set(ids).size !== threads) throw new Error(`${threads} tasks landed on ${new Set(ids).size} threads`);
    } catch (error) {
      this.lost("workers did not start", error);
      return;
    }
    if (this.closing) return;
    for (const thread of this.piscina.threads) {
      const { threadId } = thread;
      thread.once("exit", (code) => this.lost(`worker thread ${threadId} exited with code ${code}`));
    }
    this.running = true;
    this.applyRefs();
  }

  /** While true the threads keep the process alive: a read is pending. */
  keepAlive(on: boolean): void {
    this.refs = on;
    if (this.running) this.applyRefs();
  }

  async destroy(): Promise<void> {
    this.closing = true;
    this.running = false;
    await this.piscina.destroy();
  }

  private applyRefs(): void {
    for (const thread of this.piscina.threads) {
      if (this.refs) thread.ref();
      else thread.unref();
    }
  }

  private lost(reason: string, cause?: unknown): void {
    if (this.closing) return;
    this.closing = true;
    this.running = false;
    this.onLost(reason, cause);
  }
}
