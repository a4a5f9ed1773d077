/** Options that several commands share, and how their values are read. */
import { type Command, InvalidArgumentError, Option } from "commander";
import { MAX_THREADS } from "../backend/cpu/layout.js";
import { DEVICE_CHOICES, type DeviceChoice, init } from "../backend/devices.js";
import type { Backend } from "../core/backend.js";
import { HalfbyteError } from "../core/errors.js";

/** A whole number from `least` to `most`. */
export function integer(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = /^\d+$/.test(text) ? Number(text) : Number.NaN;
    if (!(value >= least && value <= most)) {
      throw new InvalidArgumentError(`It must be a whole number from ${least} to ${most}.`);
    }
    return value;
  };
}

/** A reader whose typed errors are the user's mistakes. */
export function checked<T>(read: (text: string) => T): (text: string) => T {
  return (text) => {
    try {
      return read(text);
    } catch (error) {
      if (!(error instanceof HalfbyteError)) throw error;
      const expected = "expected" in error ? `It must be ${error.expected}.` : error.message;
      throw new InvalidArgumentError(expected);
    }
  };
}

/** Adds `--threads N`. */
export function threadsOption(command: Command): Command {
  const option = new Option("--threads <N>", "worker threads (default: HALFBYTE_THREADS, else the available cores)");
  return command.addOption(option.argParser(integer(1, MAX_THREADS)));
}

/** Adds `--json`. */
export function jsonOption(command: Command): Command {
  return command.option("--json", "print one JSON object on standard output and nothing else");
}

/** Adds `--device`. */
export function deviceOption(command: Command): Command {
  const option = new Option("--device <DEVICE>", "where to compute (default: HALFBYTE_DEVICE, else auto)");
  return command.addOption(option.choices(DEVICE_CHOICES));
}

/** What `deviceOption` and `threadsOption` give. */
export interface DeviceOptions {
  readonly device?: DeviceChoice;
  /** Of the cpu; nothing to cuda. */
  readonly threads?: number;
}

/**
 * Makes the backend that the options name, which everything then uses by default.
 * @throws CudaUnavailableError, ArgumentError (HALFBYTE_DEVICE, HALFBYTE_THREADS)
 */
export async function useDevice({ device, threads }: DeviceOptions): Promise<Backend> {
  return init({ device, threads });
}
