/**
 * Does the cuda backend work here? Found out in a process of its own, which opens the driver, runs kernels and checks their
 * numbers: a driver that crashes or hangs must not take the user's program along. A success is remembered, in this process and
 * in a file; a failure in this process only, so that whatever is mended is seen by the next one.
 */
import { type ChildProcess, type SpawnSyncReturns, spawn, spawnSync } from "node:child_process";
import type { Readable } from "node:stream";
import { fileURLToPath } from "node:url";
import {
  ArgumentError,
  type CudaUnavailableCause,
  CudaUnavailableError,
  NoKernelImageError,
} from "../../core/errors.js";
import { kernelFolder } from "./backend.js";
import type { CudaDevice } from "./device.js";
import { findAddon } from "./load.js";
import { type ProbeTarget, readCache, writeCache } from "./probe-cache.js";
import { findTraces } from "./traces.js";

/** What the probe found. */
export type ProbeResult =
  | {
      readonly ok: true;
      readonly device: CudaDevice;
      /** The kernel image of each family that fits the device, as `fourbit sm_87 cubin, nvrtc 11.8.89`. */
      readonly images: readonly string[];
      /** What the probe took, when it ran. */
      readonly milliseconds: number;
      /** True when nothing was run for this answer. */
      readonly cached: boolean;
    }
  | {
      readonly ok: false;
      readonly reason: CudaUnavailableCause;
      /** What was found. */
      readonly detail: string;
      /** One sentence. */
      readonly advice: string;
      /** Where the driver got as far as to name it. */
      readonly device?: CudaDevice;
      /** With `no-kernel-image`: what the package has code for. */
      readonly available?: readonly string[];
      readonly cached: boolean;
    };

type Failure = Extract<ProbeResult, { ok: false }>;

export interface ProbeOptions {
  /** Run it even when the answer is known. Default false. */
  readonly fresh?: boolean | undefined;
  /** Milliseconds after which the driver is given up. Default: HALFBYTE_PROBE_TIMEOUT, else 30,000. */
  readonly timeout?: number | undefined;
  /** The device's ordinal. Default 0. */
  readonly device?: number | undefined;
  /** As in `CudaOptions`. */
  readonly kernels?: string | undefined;
  /** As in `CudaOptions`. */
  readonly library?: string | undefined;
}

/** What the probe's process is asked. */
export interface ProbeRequest {
  readonly device: number;
  readonly kernels: string;
  readonly library?: string | undefined;
}

/** A line that the probe's process writes: what it does next, or the end. */
export type ProbeMessage = { readonly at: string } | ChildResult;
export type ChildResult =
  | {
      readonly ok: true;
      readonly device: CudaDevice;
      readonly images: readonly string[];
      /** The driver library that was opened, links resolved. */
      readonly library: string | null;
    }
  | Omit<Failure, "cached">;

/** How the process ended. */
interface Outcome {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly timedOut: boolean;
  /** Why it could not be started. */
  readonly error?: Error | undefined;
  readonly messages: string;
  readonly stderr: string;
}

// A program, not a module: it stands above this layer because it checks the numbers of real operations.
const CHILD = new URL("../../ops/probe-child.js", import.meta.url);
/** The file descriptor of its messages: the driver may print what it likes on the others. */
export const PROBE_FD = 3;
const DEFAULT_TIMEOUT = 30_000;
/** Longer than any timer of Node allows is no timeout. */
const MAX_TIMEOUT = 2 ** 31 - 1;
/** Characters of a crashed driver's last words that are kept, and bytes that it may say in all. */
const LAST_WORDS = 400;
const MAX_WORDS = 64 << 20;
/** Milliseconds between the end of the process and that of its pipes. */
const GRACE = 500;
/**
 * Set in the probe's process. Where `process.execPath` is not Node but a program that contains it, that program itself is what a
 * probe starts: it would start the next one, and so on for ever.
 */
const INSIDE = "HALFBYTE_INSIDE_PROBE";

const NO_DRIVER: Failure = {
  ok: false,
  reason: "no-driver",
  detail: "there is no NVIDIA driver on this machine (no device file, no libcuda.so.1)",
  advice:
    "On a machine with an NVIDIA GPU install its driver; in a container pass the GPU in (--gpus all or --runtime=nvidia).",
  cached: false,
};

const NESTED: Failure = {
  ok: false,
  reason: "probe-crashed",
  detail: "this process was itself started by a probe, in the place of Node.js",
  advice: "Make process.execPath a Node.js that runs the script it is given.",
  cached: false,
};

const known = new Map<string, ProbeResult>();
const underWay = new Map<string, Promise<ProbeResult>>();

/**
 * Finds out whether the cuda backend works here: the driver is opened, the device taken, NF4 quantized and decoded, and the
 * numbers compared with plain JavaScript, all in a child process. Costs well under a millisecond where there is no NVIDIA
 * driver or the answer is known. From a worker thread the answer is always `worker-thread`.
 * @throws ArgumentError when `timeout` or HALFBYTE_PROBE_TIMEOUT is not a number of milliseconds
 */
export async function probeCuda(options: ProbeOptions = {}): Promise<ProbeResult> {
  const plan = prepare(options);
  if ("ok" in plan) return plan;
  const running = options.fresh ? undefined : underWay.get(plan.key);
  if (running) return running;
  const probing = run(plan).then((outcome) => conclude(plan, outcome));
  underWay.set(plan.key, probing);
  try {
    return await probing;
  } finally {
    if (underWay.get(plan.key) === probing) underWay.delete(plan.key);
  }
}

/** `probeCuda` that blocks the thread, up to the timeout. */
export function probeCudaSync(options: ProbeOptions = {}): ProbeResult {
  const plan = prepare(options);
  return "ok" in plan ? plan : conclude(plan, runSync(plan));
}

/** The error that says why cuda cannot be used. */
export function unavailable(failure: Failure, op = "device"): CudaUnavailableError {
  const { reason, detail, advice, device, available } = failure;
  if (reason === "no-kernel-image" && device && available) {
    return new NoKernelImageError(`sm_${device.architecture}`, available, advice);
  }
  return new CudaUnavailableError(reason, detail, advice, op);
}

interface Plan {
  readonly key: string;
  readonly target: ProbeTarget;
  readonly timeout: number;
  readonly started: number;
}

/** What is known without running anything, or what to run. */
function prepare(options: ProbeOptions): ProbeResult | Plan {
  const timeout = timeoutOf(options.timeout);
  const library = options.library ?? (process.env.HALFBYTE_CUDA_LIBRARY || undefined);
  const nothing = library === undefined && !findTraces().any;
  let addon: string;
  try {
    addon = findAddon();
  } catch (error) {
    if (!(error instanceof CudaUnavailableError)) throw error;
    const { reason, detail, advice } = error;
    // Where there is nothing to drive, a missing addon is not what is wrong.
    return nothing && reason === "addon-missing" ? NO_DRIVER : { ok: false, reason, detail, advice, cached: false };
  }
  if (nothing) return NO_DRIVER;
  if (process.env[INSIDE]) return NESTED;
  const { device = 0 } = options;
  const target = { device, kernels: kernelFolder(options.kernels), library, addon };
  const key = JSON.stringify(target);
  if (!options.fresh) {
    const remembered = known.get(key) ?? readCache(target);
    if (remembered) {
      const result = { ...remembered, cached: true };
      known.set(key, result);
      return result;
    }
  }
  return { key, target, timeout, started: performance.now() };
}

function timeoutOf(option: number | undefined): number {
  const env = process.env.HALFBYTE_PROBE_TIMEOUT;
  const value = option ?? (env ? Number(env) : DEFAULT_TIMEOUT);
  if (value > 0 && value <= MAX_TIMEOUT) return value;
  const [name, received] = option === undefined ? ["HALFBYTE_PROBE_TIMEOUT", env] : ["timeout", option];
  throw new ArgumentError("probeCuda", name, "a positive number of milliseconds", String(received));
}

function invocation({ target }: Plan) {
  const { device, kernels, library } = target;
  const request: ProbeRequest = { device, kernels, library };
  // What the user's program wants of Node (a debugger, hooks) is nothing for the probe.
  const env = { ...process.env, NODE_OPTIONS: "", ELECTRON_RUN_AS_NODE: "1", [INSIDE]: "1" };
  return { args: [fileURLToPath(CHILD), JSON.stringify(request)], env };
}

function run(plan: Plan): Promise<Outcome> {
  const { args, env } = invocation(plan);
  return new Promise((resolve) => {
    let messages = "";
    let stderr = "";
    let timedOut = false;
    let child: ChildProcess | undefined;
    const done = (end: Pick<Outcome, "code" | "signal" | "error">): void => {
      clearTimeout(timer);
      process.off("exit", kill);
      for (const stream of child?.stdio ?? []) stream?.destroy();
      resolve({ ...end, timedOut, messages, stderr });
    };
    const kill = (): void => void child?.kill("SIGKILL");
    const timer = setTimeout(() => {
      timedOut = true;
      kill();
      // A process that hangs inside the kernel cannot be killed: nobody waits for it.
      child?.unref();
      done({ code: null, signal: null });
    }, plan.timeout);
    try {
      child = spawn(process.execPath, args, { env, stdio: ["ignore", "ignore", "pipe", "pipe"] });
    } catch (error) {
      done({ code: null, signal: null, error: error as Error });
      return;
    }
    process.on("exit", kill);
    child.on("error", (error) => done({ code: null, signal: null, error }));
    child.on("close", (code, signal) => done({ code, signal }));
    // Something that the driver has started may hold the pipes open.
    child.on("exit", (code, signal) => setTimeout(() => done({ code, signal }), GRACE).unref());
    // A process that is out of file descriptors gets no pipes, whatever the types say; the error comes by its event.
    const [words, results] = [child.stderr, child.stdio?.[PROBE_FD] as Readable | undefined];
    words?.setEncoding("utf8").on("data", (text: string) => {
      stderr = (stderr + text).slice(-4 * LAST_WORDS);
    });
    results?.setEncoding("utf8").on("data", (text: string) => {
      messages += text;
    });
  });
}

function runSync(plan: Plan): Outcome {
  const { args, env } = invocation(plan);
  let ended: SpawnSyncReturns<string>;
  try {
    ended = spawnSync(process.execPath, args, {
      env,
      stdio: ["ignore", "ignore", "pipe", "pipe"],
      timeout: plan.timeout,
      killSignal: "SIGKILL",
      encoding: "utf8",
      maxBuffer: MAX_WORDS,
    });
  } catch (error) {
    // Node's permission model throws where everything else is in the result.
    return { code: null, signal: null, timedOut: false, error: error as Error, messages: "", stderr: "" };
  }
  const timedOut = (ended.error as NodeJS.ErrnoException | undefined)?.code === "ETIMEDOUT";
  const { status: code, signal, error } = ended;
  const [, , stderr, messages] = ended.output ?? [];
  return {
    code,
    signal,
    timedOut,
    error: timedOut ? undefined : error,
    messages: messages ?? "",
    stderr: stderr ?? "",
  };
}

function conclude(plan: Plan, outcome: Outcome): ProbeResult {
  const { result, library } = interpret(outcome, plan);
  known.set(plan.key, result);
  if (result.ok && library) writeCache(plan.target, library, result);
  return result;
}

/** What the process said and how it ended, as a result. */
function interpret(outcome: Outcome, plan: Plan): { result: ProbeResult; library?: string | null } {
  const { code, signal, error, timedOut } = outcome;
  let at = "the process started";
  let said: ChildResult | undefined;
  for (const line of outcome.messages.split("\n")) {
    const message = parse(line);
    if (!message) continue;
    if ("at" in message) at = message.at;
    else said = message;
  }
  // A refusal counts however the process ends afterwards; a success only when it also ends well.
  if (said?.ok === false) return { result: { ...said, cached: false } };
  if (timedOut) {
    return failed("probe-timeout", `no answer within ${plan.timeout} ms while ${at}`, TIMEOUT_ADVICE);
  }
  if (error) {
    return failed("probe-crashed", `the probe cannot be started: ${error.message}`, START_ADVICE);
  }
  if (said && code === 0) {
    const { library, ...found } = said;
    const milliseconds = performance.now() - plan.started;
    return { result: { ...found, milliseconds, cached: false }, library };
  }
  const words = outcome.stderr.trim().slice(-LAST_WORDS);
  const end = signal ? `ended with ${signal}` : `exited with code ${code}`;
  return failed("probe-crashed", `the probe ${end} while ${at}${words ? ` (${words})` : ""}`, CRASH_ADVICE);
}

const TIMEOUT_ADVICE =
  "See whether the GPU is hung or busy (dmesg, tegrastats or nvidia-smi), or allow more with HALFBYTE_PROBE_TIMEOUT.";
const START_ADVICE = "Allow this program to start Node.js as a child process.";
const CRASH_ADVICE = "Look at dmesg, and install the driver that belongs to this system again.";

function failed(reason: CudaUnavailableCause, detail: string, advice: string): { result: Failure } {
  return { result: { ok: false, reason, detail, advice, cached: false } };
}

function parse(line: string): ProbeMessage | undefined {
  try {
    const value = JSON.parse(line) as ProbeMessage | null;
    return typeof value === "object" && value !== null && ("ok" in value || "at" in value) ? value : undefined;
  } catch {
    return undefined;
  }
}
