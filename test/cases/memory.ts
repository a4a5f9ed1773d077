/** Copies and fills at every alignment: what a backend does by itself, by the driver or by a kernel. */
import type { Backend } from "#halfbyte/core/backend.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { random } from "../helpers/random.js";
import { type Case, caseId, framed, framedHost, type Host } from "./case.js";

const BYTES = [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 65, 255, 257, 1023, 4097, 65537, 300007];

/** Destinations one after the other in one allocation, each `gap` bytes behind the last. */
function places(offset: number, gap: number): { at: number; bytes: number }[] {
  let at = offset;
  return BYTES.map((bytes) => {
    const place = { at, bytes };
    at += bytes + gap;
    return place;
  });
}

function blob(n: number, seed: string): Host {
  const next = random(seed);
  return { dtype: "u8", shape: [n], values: Uint8Array.from({ length: n }, next) };
}

const end = (all: readonly { at: number; bytes: number }[]): number => Math.max(...all.map((p) => p.at + p.bytes));

function target(backend: Backend, n: number): { view: Tensor<"u8">; base: Tensor<"u8"> } {
  return framed(backend, "u8", [n], 0);
}

function framedBytes(n: number, write: (bytes: Uint8Array) => void): Host {
  const bytes = new Uint8Array(n).fill(0xa5);
  write(bytes);
  return framedHost({ dtype: "u8", shape: [n], values: [], bytes }, 0);
}

/** Copies of many lengths: from `source` bytes behind an aligned address to `destination` bytes behind one. */
function copyCase(source: number, destination: number): Case {
  const id = caseId("copy", `src+${source}`, `dst+${destination}`);
  const to = places(destination, 16);
  const from = places(source, 32);
  return {
    id,
    primitive: "copy",
    dtype: "u8",
    inputs: () => ({ x: blob(end(from), id) }),
    run: ({ x }, backend) => {
      const { view, base } = target(backend, end(to));
      for (const [i, { at, bytes }] of to.entries()) {
        const src = { storage: x!.storage, byteOffset: x!.byteOffset + from[i]!.at };
        backend.launch("copy", { src, dst: { storage: view.storage, byteOffset: at }, bytes });
      }
      return { base };
    },
    expected: ({ x }) => ({
      base: framedBytes(end(to), (all) => {
        const values = x!.values as Uint8Array;
        for (const [i, { at, bytes }] of to.entries()) all.set(values.subarray(from[i]!.at, from[i]!.at + bytes), at);
      }),
    }),
  };
}

function fillCase(value: number, offset: number, gap: number): Case {
  const id = caseId("fill", `0x${value.toString(16)}`, `dst+${offset}`, `gap=${gap}`);
  const all = places(offset, gap);
  return {
    id,
    primitive: "fill",
    dtype: "u8",
    inputs: () => ({}),
    run: (_, backend) => {
      const { view, base } = target(backend, end(all));
      for (const { at, bytes } of all) {
        backend.launch("fill", { dst: { storage: view.storage, byteOffset: at }, bytes, value });
      }
      return { base };
    },
    expected: () => ({
      base: framedBytes(end(all), (bytes) => {
        for (const place of all) {
          for (let i = 0; i < place.bytes; i++) bytes[place.at + i] = (value >>> (8 * (i & 3))) & 255;
        }
      }),
    }),
  };
}

/** A copy of many blocks, of a length that is a multiple of nothing. */
function largeCopyCase(): Case {
  const id = caseId("copy", "n=33554467", "large");
  const n = 33554467;
  const input = (): Uint8Array<ArrayBuffer> => {
    const words = new Uint32Array(Math.ceil(n / 4));
    for (let i = 0; i < words.length; i++) words[i] = Math.imul(i, 0x9e3779b1) ^ (i >>> 3);
    return new Uint8Array(words.buffer, 0, n);
  };
  return {
    id,
    primitive: "copy",
    dtype: "u8",
    large: true,
    lead: { x: 3 },
    inputs: () => ({ x: { dtype: "u8", shape: [n], values: [], bytes: input() } }),
    run: ({ x }) => ({ y: x!.clone() }),
    expected: ({ x }) => ({ y: x! }),
  };
}

export function* memoryCases(): Generator<Case> {
  for (const source of [0, 1, 4, 7, 8])
    for (const destination of [0, 1, 2, 4, 8, 15]) yield copyCase(source, destination);
  for (const value of [0, 0x5c5c5c5c, 0x01020304, 0xff0000fe]) {
    for (const offset of [0, 1, 2, 3, 4]) for (const gap of [16, 17]) yield fillCase(value, offset, gap);
  }
  yield largeCopyCase();
}
