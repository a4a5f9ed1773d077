/** What `halfbyte doctor` does alike on every device: the numbers of a kernel, and what a launch costs. */
import type { Backend } from "../core/backend.js";
import { Tensor } from "../core/tensor.js";
import { selfCheck } from "../ops/selfcheck.js";
import { formatBytes } from "./output.js";

/** One finding. */
export interface Check {
  readonly name: string;
  /** `info` is neither good nor bad. */
  readonly status: "ok" | "failed" | "info";
  readonly detail: string;
  /** What to do, of a failure. */
  readonly advice?: string;
}

/** What a launch costs. */
export interface Latency {
  /** Nanoseconds a launch in a chain. */
  readonly launch: number;
  /** Microseconds from a launch to its result, the median. */
  readonly roundTrip: number;
}

const CHAIN = 10_000;
const ROUND_TRIPS = 50;

export function info(name: string, detail: string): Check {
  return { name, status: "info", detail };
}

export function result(name: string, ok: boolean, detail: string, advice: string): Check {
  return ok ? { name, status: "ok", detail } : { name, status: "failed", detail, advice };
}

/** NF4 there and back on a backend, and the same in plain JavaScript. */
export async function checkKernel(backend: Backend): Promise<Check> {
  const { elements, wrong, milliseconds } = await selfCheck(backend);
  const workers = "threads" in backend ? `${backend.threads} workers, ` : "";
  const right = `${workers}NF4 of ${elements} elements equals plain JavaScript (${milliseconds.toFixed(0)} ms with start-up)`;
  const advice = "do not trust results of this machine; report it with the output of halfbyte doctor --json";
  return result(`${backend.device} kernel`, wrong === undefined, wrong ?? right, advice);
}

/** What a launch costs in a chain, and from a launch to its result. */
export async function measureLatency(backend: Backend): Promise<Latency> {
  const word = Tensor.allocate(backend, "u8", [4]);
  const launch = (): void => backend.launch("fill", { dst: word, bytes: 4, value: 0 });
  const chain = async (): Promise<number> => {
    const started = performance.now();
    for (let i = 0; i < CHAIN; i++) launch();
    await backend.synchronize();
    return (1e6 * (performance.now() - started)) / CHAIN;
  };
  // The first one warms up.
  await chain();
  const perLaunch = Math.min(await chain(), await chain());
  const trips: number[] = [];
  for (let i = 0; i < ROUND_TRIPS; i++) {
    const started = performance.now();
    launch();
    await backend.synchronize();
    trips.push(1e3 * (performance.now() - started));
  }
  word.dispose();
  return { launch: perLaunch, roundTrip: trips.sort((a, b) => a - b)[ROUND_TRIPS / 2]! };
}

export function describeLatency({ device }: Backend, { launch, roundTrip }: Latency): Check {
  const detail = `${launch.toFixed(0)} ns a launch in a chain of ${CHAIN}, ${roundTrip.toFixed(0)} µs from launch to result`;
  return info(`${device} launch`, detail);
}

export function describeMemory(backend: Backend): Check {
  const { committedBytes, limitBytes } = backend.memory();
  return info(
    `${backend.device} memory`,
    `${formatBytes(committedBytes)} taken, up to ${formatBytes(limitBytes)} for tensors`,
  );
}
