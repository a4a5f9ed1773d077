/** Running one case on a backend, and saying what differs. */
import { createHash } from "node:crypto";
import type { Backend, DeviceName } from "#halfbyte/core/backend.js";
import { DTYPE_BYTES, type DType, isFloat } from "#halfbyte/core/dtype.js";
import { keep, tidy } from "#halfbyte/core/scope.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { isWithin } from "../helpers/bounds.js";
import { decode } from "../helpers/scalar.js";
import { type Case, describeElement, type Host, hostBytes } from "./case.js";

/** What a case gave, by name. */
export interface Output {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly bytes: Uint8Array<ArrayBuffer>;
}
export type Outputs = Record<string, Output>;

/** What a case has to give: bytes, or values and how far each element may be from its own. */
export type Expected = Record<string, Output | Bounded>;
interface Bounded extends Omit<Output, "bytes"> {
  readonly values: ArrayLike<number>;
  readonly bound: ArrayLike<number>;
}

/** Uploads the inputs, runs the case, gives the outputs' bytes back. Leaves no tensor behind. */
export function runCase(backend: Backend, c: Case, inputs: Record<string, Host>): Outputs {
  return tidy(() => {
    const results = Object.entries(launchCase(backend, c, inputs));
    return Object.fromEntries(results.map(([name, t]) => [name, { ...about(t), bytes: t.bytesSync() }]));
  });
}

/** `runCase` that does not block: everything is launched when it returns, and the reads are pending. */
export async function runCaseAsync(backend: Backend, c: Case, inputs: Record<string, Host>): Promise<Outputs> {
  const results = tidy(() => keep(Object.entries(launchCase(backend, c, inputs))));
  const reads = results.map(async ([name, t]) => [name, { ...about(t), bytes: await t.bytes() }] as const);
  // The memory is given back before the kernels have run, as a program's would be.
  for (const [, t] of results) t.dispose();
  return Object.fromEntries(await Promise.all(reads));
}

function about({ dtype, shape }: Tensor): Pick<Output, "dtype" | "shape"> {
  return { dtype, shape };
}

function launchCase(backend: Backend, c: Case, inputs: Record<string, Host>): Record<string, Tensor> {
  const operands: Record<string, Tensor> = {};
  for (const [name, host] of Object.entries(inputs)) operands[name] = upload(backend, host, c.lead?.[name] ?? 0);
  return c.run(operands, backend);
}

function upload(backend: Backend, host: Host, lead: number): Tensor {
  const { dtype, shape } = host;
  const n = shape.reduce((a, b) => a * b, 1);
  const all = Tensor.allocate(backend, dtype, lead === 0 ? shape : [lead + n]);
  const tensor = lead === 0 ? all : all.slice(lead, lead + n).reshape(shape);
  backend.write(tensor.storage, tensor.byteOffset, hostBytes(host));
  return tensor;
}

/** 16 hex digits that stand for the names, dtypes, shapes and bits of what a case gave. */
export function outputsHash(outputs: Outputs): string {
  const hash = createHash("sha256");
  for (const [name, { dtype, shape, bytes }] of Object.entries(outputs).sort(([a], [b]) => (a < b ? -1 : 1))) {
    hash.update(`${name} ${dtype} [${shape}]\n`).update(bytes);
  }
  return hash.digest("hex").slice(0, 16);
}

/** What two machines, or a machine and the reference, disagree about: one paragraph, or undefined. */
export function compareOutputs(c: Case, expected: Expected, actual: Outputs, rerun = rerunLine(c)): string | undefined {
  const problems: string[] = [];
  for (const name of new Set([...Object.keys(expected), ...Object.keys(actual)])) {
    const [want, got] = [expected[name], actual[name]];
    const problem = !want || !got ? `${want ? "missing" : "not expected"}` : difference(want, got);
    if (problem) problems.push(`  ${name}: ${problem}`);
  }
  return problems.length === 0 ? undefined : [c.id, ...problems, `  ${rerun}`].join("\n");
}

export function rerunLine(c: Case): string {
  return `HALFBYTE_CASE='${c.id}' npx vitest run test/ops`;
}

/** The outputs of the scalar reference for a device. */
export function expectedOutputs(c: Case, inputs: Record<string, Host>, device: DeviceName): Expected {
  const hosts = Object.entries(c.expected(inputs, device));
  if (hosts.some(([, { bound }]) => bound !== undefined) !== (c.bounded ?? false)) {
    throw new Error(`${c.id}: only the case or only its outputs are bounded`);
  }
  return Object.fromEntries(
    hosts.map(([name, host]) => {
      const { dtype, shape, values, bound } = host;
      return [name, bound ? { dtype, shape, values, bound } : { dtype, shape, bytes: hostBytes(host) }];
    }),
  );
}

/**
 * What `device` has to give, where `other` has already given it: that, or the reference where their bits may differ.
 */
export function expectedOn(device: DeviceName, c: Case, inputs: Record<string, Host>, other: () => Outputs): Expected {
  return c.bounded ? expectedOutputs(c, inputs, device) : other();
}

function difference(want: Output | Bounded, got: Output): string | undefined {
  if (want.dtype !== got.dtype) return `expected ${want.dtype}, got ${got.dtype}`;
  if (`${want.shape}` !== `${got.shape}`) return `expected shape [${want.shape}], got [${got.shape}]`;
  return "bound" in want ? farOff(want, got) : otherBits(want, got);
}

/** The values of what a case gave. */
export function outputValues({ dtype, bytes }: Output): Float64Array {
  if (!isFloat(dtype)) throw new Error(`${dtype} is held to its bits`);
  const array = dtype === "f32" ? Uint32Array : Uint16Array;
  return Float64Array.from(new array(bytes.buffer, bytes.byteOffset, bytes.length / array.BYTES_PER_ELEMENT), (bits) =>
    decode(dtype, bits),
  );
}

function farOff({ dtype, shape, values, bound }: Bounded, got: Output): string | undefined {
  const elements = outputValues(got);
  const n = shape.reduce((a, b) => a * b, 1);
  for (const { length } of [values, bound, elements]) if (length !== n) throw new Error(`${length} values, not ${n}`);
  const off: { i: number; by: number }[] = [];
  for (let i = 0; i < n; i++) {
    if (isFloat(dtype) && isWithin(dtype, values[i]!, bound[i]!, elements[i]!)) continue;
    off.push({ i, by: Math.abs(elements[i]! - values[i]!) / bound[i]! });
  }
  if (off.length === 0) return undefined;
  // The worst first; where something is not finite there is no distance.
  off.sort((a, b) => (Number.isNaN(b.by) ? 1 : b.by) - (Number.isNaN(a.by) ? 1 : a.by));
  const shown = off.slice(0, 3).map(({ i, by }) => {
    const wanted = `${values[i]} within ${bound[i]!.toPrecision(3)}`;
    return `[${i}] expected ${wanted} got ${describeElement(dtype, got.bytes, i)}, ${by.toFixed(1)} times that off`;
  });
  return `${off.length} of ${n} too far off: ${shown.join("; ")}${off.length > shown.length ? "; ..." : ""}`;
}

function otherBits(want: Output, got: Output): string | undefined {
  if (Buffer.compare(want.bytes, got.bytes) === 0) return undefined;
  const size = DTYPE_BYTES[want.dtype];
  const differing: number[] = [];
  let count = 0;
  const n = Math.max(want.bytes.length, got.bytes.length) / size;
  for (let i = 0; i < n; i++) {
    let same = true;
    for (let k = i * size; k < (i + 1) * size; k++) same &&= want.bytes[k] === got.bytes[k];
    if (!same && count++ < 3) differing.push(i);
  }
  const shown = differing.map((i) => {
    const [a, b] = [want, got].map((o) => describeElement(o.dtype, o.bytes, i));
    return `[${i}] expected ${a} got ${b}`;
  });
  return `${count} of ${n} differ: ${shown.join("; ")}${count > differing.length ? "; ..." : ""}`;
}
