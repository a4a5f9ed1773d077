/** Running one case on a backend, and saying what differs. */
import type { Backend } from "#halfbyte/core/backend.js";
import { tidy } from "#halfbyte/core/scope.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { type Case, fromHostBytes, type Host, hostBytes } from "./case.js";

/** Uploads the inputs, runs the case, gives the outputs' bytes back. Leaves no tensor behind. */
export function runCase(
  backend: Backend,
  c: Case,
  inputs: Record<string, Host>,
): Record<string, Uint8Array<ArrayBuffer>> {
  return tidy(() => {
    const operands: Record<string, Tensor> = {};
    for (const [name, host] of Object.entries(inputs)) {
      const tensor = Tensor.allocate(backend, host.dtype, host.shape);
      backend.write(tensor.storage, tensor.byteOffset, hostBytes(host));
      operands[name] = tensor;
    }
    return Object.fromEntries(Object.entries(c.run(operands)).map(([name, t]) => [name, t.bytesSync()]));
  });
}

/** The first mismatch as a line that says what to run again, or undefined. */
export function compare(c: Case, name: string, expected: Host, actual: Uint8Array<ArrayBuffer>): string | undefined {
  const want = hostBytes(expected);
  if (Buffer.compare(want, actual) === 0) return undefined;
  const a = fromHostBytes(expected.dtype, want);
  const b = fromHostBytes(expected.dtype, actual);
  const bad = a.flatMap((v, i) => (Object.is(v, b[i]) ? [] : [i]));
  const at = bad.reduce(
    (worst, i) => (Math.abs(a[i]! - b[i]!) > Math.abs(a[worst]! - b[worst]!) ? i : worst),
    bad[0] ?? 0,
  );
  return `${name}: ${bad.length} of ${a.length} differ (got ${b.length}), worst [${at}] expected ${a[at]} got ${b[at]}\n  HALFBYTE_CASE='${c.id}' npx vitest run test/ops`;
}
