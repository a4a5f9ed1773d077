/** Builds safetensors files and model folders for tests: valid ones, and ones wrong in just the way a test asks for. */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { HalfbyteError } from "#halfbyte/core/errors.js";
import { bytesOfShape } from "#halfbyte/formats/safetensors.js";
import type { SafetensorsDType, SourceTensor } from "#halfbyte/formats/source.js";
import { random } from "./random.js";

/** A folder of its own, removed by `remove()`. */
export function temporaryFolder(): { path: string; file: (name: string) => string; remove: () => void } {
  const path = mkdtempSync(join(tmpdir(), "halfbyte-test-"));
  return { path, file: (name) => join(path, name), remove: () => rmSync(path, { recursive: true, force: true }) };
}

export interface TestTensor {
  dtype: SafetensorsDType;
  shape: readonly number[];
  data?: Uint8Array;
}

/** Random bytes for a tensor. */
export function randomBytes(length: number, seed: number | string): Uint8Array {
  const next = random(seed);
  return Uint8Array.from({ length }, () => next() & 255);
}

export function dataOf(name: string, tensor: TestTensor): Uint8Array {
  return tensor.data ?? randomBytes(bytesOfShape(tensor.dtype, tensor.shape)!, name);
}

/** A file from a header text (or object) and data. `declared` replaces the header's length. */
export function rawFile(
  header: string | object | Uint8Array,
  data: Uint8Array | number = 0,
  declared?: number | bigint,
) {
  const text = typeof header === "string" ? header : header instanceof Uint8Array ? header : JSON.stringify(header);
  const json = Buffer.from(text as string);
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(BigInt(declared ?? json.length));
  return Buffer.concat([prefix, json, typeof data === "number" ? Buffer.alloc(data) : data]);
}

/** A valid file: tensors one after the other in the given order. */
export function safetensorsBytes(tensors: Record<string, TestTensor>, metadata?: Record<string, string>): Buffer {
  const header: [string, unknown][] = metadata ? [["__metadata__", metadata]] : [];
  const parts: Uint8Array[] = [];
  let offset = 0;
  for (const [name, tensor] of Object.entries(tensors)) {
    const data = dataOf(name, tensor);
    const { dtype, shape } = tensor;
    header.push([name, { dtype, shape, data_offsets: [offset, offset + data.length] }]);
    parts.push(data);
    offset += data.length;
  }
  return rawFile(Object.fromEntries(header), Buffer.concat(parts));
}

/** What `ModelSource.tensors` would be. */
export function entries(tensors: Record<string, TestTensor>): Map<string, SourceTensor> {
  return new Map(Object.entries(tensors).map(([name, { dtype, shape }]) => [name, { name, dtype, shape }]));
}

export function writeJson(path: string, value: unknown): void {
  writeFileSync(path, JSON.stringify(value));
}

/** The error that a promise rejects with; fails when it does not. */
export async function rejection(promise: Promise<unknown>): Promise<unknown> {
  let error: unknown;
  let resolved = false;
  try {
    await promise;
    resolved = true;
  } catch (e) {
    error = e;
  }
  if (resolved) throw new Error("expected a rejection");
  return error;
}

/** The typed error that a task throws; fails when it throws none, or another. */
export function failure(task: () => unknown): HalfbyteError {
  try {
    task();
  } catch (error) {
    if (error instanceof HalfbyteError) return error;
    throw error;
  }
  throw new Error("expected an error");
}
