/** Work on many tensors at a time, within a bound on what is in memory. */

/** Something to do that holds about `weight` elements in memory while it runs. */
export interface Job {
  readonly weight: number;
  run(): Promise<void>;
}

/** Elements in flight, at some 15 bytes each: the source's bytes, the device's copies, the results. */
const CAPACITY = 24 << 20;
/** More jobs than this at a time gain nothing: reads and writes wait for the same disk. */
const MAX_JOBS = 8;

/**
 * Runs the jobs, started in order. A job heavier than the capacity runs alone. After the first failure no job is started;
 * the promise rejects with that failure when the running ones have ended.
 */
export async function runJobs(jobs: Iterable<Job>): Promise<void> {
  let weight = 0;
  let failure: { readonly error: unknown } | undefined;
  const running = new Set<Promise<void>>();
  for (const job of jobs) {
    while (running.size > 0 && (running.size >= MAX_JOBS || weight + job.weight > CAPACITY))
      await Promise.race(running);
    if (failure) break;
    weight += job.weight;
    const done: Promise<void> = job
      .run()
      .catch((error: unknown) => {
        failure ??= { error };
      })
      .then(() => {
        weight -= job.weight;
        running.delete(done);
      });
    running.add(done);
  }
  await Promise.all(running);
  if (failure) throw failure.error;
}
