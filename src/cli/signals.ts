/** Ctrl-C: the work under way is told to stop and cleans up; the process then exits as if the signal had ended it. */

const SIGNALS = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 } as const;

/** What a command was interrupted by. */
export class Interrupted extends Error {
  constructor(
    readonly signal: keyof typeof SIGNALS,
    readonly exitCode: number,
  ) {
    super(`interrupted by ${signal}`);
  }
}

/**
 * Runs work that heeds an AbortSignal. The first signal aborts it with `Interrupted`; a second one ends the process at once
 * (what runs on exit still cleans up).
 */
export async function interruptible<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController();
  const onSignal = (name: NodeJS.Signals): void => {
    const signal = name as keyof typeof SIGNALS;
    if (controller.signal.aborted) process.exit(SIGNALS[signal]);
    controller.abort(new Interrupted(signal, SIGNALS[signal]));
  };
  const names = Object.keys(SIGNALS) as (keyof typeof SIGNALS)[];
  for (const name of names) process.on(name, onSignal);
  try {
    return await work(controller.signal);
  } finally {
    for (const name of names) process.off(name, onSignal);
  }
}
