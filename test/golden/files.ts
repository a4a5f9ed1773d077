/** Golden files for tests: the real one, copies of it with something changed, and small ones made up. */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

/** Results of bitsandbytes' CUDA kernels; those of products are a part that scripts/fixtures/cut-golden.mjs has cut out. */
export const REAL_DIR = fileURLToPath(new URL("data/", import.meta.url));
export const REAL_FILE = "blockwise.safetensors";

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}
export type CaseFields = Record<string, unknown>;

/** A safetensors file in memory: what tests change before it is written. */
export interface Editable {
  metadata: Record<string, string>;
  /** The list of cases, or the text that stands in its place. */
  cases: CaseFields[];
  casesText?: string;
  entries: Record<string, Entry>;
  data: Uint8Array;
}

export async function loadReal(name = REAL_FILE): Promise<Editable> {
  const file = await readFile(join(REAL_DIR, name));
  const length = Number(file.readBigUInt64LE(0));
  const { __metadata__: metadata, ...entries } = JSON.parse(file.toString("utf8", 8, 8 + length));
  return { metadata, cases: JSON.parse(metadata.cases), entries, data: new Uint8Array(file.subarray(8 + length)) };
}

export function serialize({ metadata, cases, casesText = JSON.stringify(cases), entries, data }: Editable): Buffer {
  const header = Buffer.from(JSON.stringify({ __metadata__: { ...metadata, cases: casesText }, ...entries }));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(BigInt(header.length));
  return Buffer.concat([prefix, header, data]);
}

/** The bytes of a tensor, to be changed in place. */
export function bytesOf(file: Editable, tensor: string): Uint8Array {
  const entry = file.entries[tensor];
  if (!entry) throw new Error(`no tensor ${tensor}`);
  return file.data.subarray(...entry.data_offsets);
}

/** Bit patterns of an f32 tensor. */
export function wordsOf(file: Editable, tensor: string): DataView {
  const bytes = bytesOf(file, tensor);
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** A file of these tensors. */
export function makeFile(cases: CaseFields[], tensors: Record<string, ArrayBufferView & { length: number }>): Editable {
  const kinds: Record<string, string> = {
    Float32Array: "F32",
    Int8Array: "I8",
    Uint8Array: "U8",
    Uint16Array: "F16",
    Int32Array: "I32",
  };
  const entries: Record<string, Entry> = {};
  const parts: Uint8Array[] = [];
  let at = 0;
  for (const [name, array] of Object.entries(tensors)) {
    const dtype = kinds[array.constructor.name]!;
    entries[name] = { dtype, shape: [array.length], data_offsets: [at, at + array.byteLength] };
    parts.push(new Uint8Array(array.buffer, array.byteOffset, array.byteLength));
    at += array.byteLength;
  }
  return { metadata: {}, cases, entries, data: Buffer.concat(parts) };
}

/** Runs `body` with a fresh folder that holds these files. */
export async function withDir<T>(
  files: Record<string, string | Uint8Array>,
  body: (dir: string) => Promise<T>,
): Promise<T> {
  const dir = await mkdtemp(join(tmpdir(), "halfbyte-golden-"));
  try {
    for (const [name, content] of Object.entries(files)) await writeFile(join(dir, name), content);
    return await body(dir);
  } finally {
    await rm(dir, { recursive: true });
  }
}
