/** The bounds of products are wide enough for float32 sums in any order, and narrow enough for what kernels get wrong. */
import { describe, expect, test } from "vitest";
import type { DeviceName } from "#halfbyte/core/backend.js";
import { type FloatDType, isFloat } from "#halfbyte/core/dtype.js";
import { productPath } from "#halfbyte/core/product-paths.js";
import { type Case, type Host, hostBytes } from "../cases/case.js";
import { TABLES } from "../cases/fourbit.js";
import { matmul4bitCases } from "../cases/matmul4bit.js";
import { compareOutputs, expectedOutputs, type Outputs } from "../cases/run.js";
import { bytesOf, loadReal } from "../golden/files.js";
import { isWithin, product, sumBound } from "./bounds.js";
import { random } from "./random.js";
import { decode, dequantizeBlockwise, round, weights4bit } from "./scalar.js";

const LIST = new Map([...matmul4bitCases()].map((c) => [c.id, c]));
const DEVICES: readonly DeviceName[] = ["cpu", "cuda"];
const DTYPES: readonly FloatDType[] = ["f32", "f16", "bf16"];
const named = (id: string): Case => {
  const c = LIST.get(id);
  if (!c) throw new Error(`no case ${id}`);
  return c;
};

/** What the reference gives for these inputs, rounded as a kernel would. */
function rounded(c: Case, inputs: Record<string, Host>, device: DeviceName): Outputs {
  return Object.fromEntries(
    Object.entries(c.expected(inputs, device)).map(([name, host]) => {
      const { dtype, shape } = host;
      const values =
        host.bound && isFloat(dtype) ? Array.from(host.values, (v) => round(dtype, Math.fround(v))) : host.values;
      return [name, { dtype, shape, bytes: hostBytes({ ...host, values }) }];
    }),
  );
}

/** The share of `tries` in which the comparison sees what `change` does to the inputs. */
function caught(
  id: string,
  device: DeviceName,
  change: (inputs: Record<string, Host>, next: () => number) => Record<string, Host>,
  tries = 1,
): number {
  const c = named(id);
  const inputs = c.inputs();
  const expected = expectedOutputs(c, inputs, device);
  expect(compareOutputs(c, expected, rounded(c, inputs, device)), id).toBeUndefined();
  const next = random(id);
  let seen = 0;
  for (let i = 0; i < tries; i++) {
    const wrong = rounded(c, change(inputs, next), device);
    if (compareOutputs(c, expected, wrong)) seen++;
  }
  return seen / tries;
}

const replaced = (host: Host, change: (values: number[]) => void): Host => {
  const values = Array.from(host.values);
  change(values);
  return { ...host, values: host.dtype === "u8" ? Uint8Array.from(values) : values };
};

for (const device of DEVICES) {
  // The GPU's bounds are others where weights are in 16 bits and rows few.
  for (const dtype of device === "cpu" ? DTYPES : DTYPES.slice(1)) {
    for (const type of ["nf4", "fp4"] as const) {
      describe(`a bound of ${type} in ${dtype} on ${device} is too narrow for`, () => {
        const k = device === "cpu" ? 127 : 128;
        const id = (m: number, more = "", size = `n=17:k=${k}:bs=64`) =>
          `matmul4bit:${type}:${dtype}:m=${m}:${size}${more}`;
        const rows = device === "cpu" ? [1, 9, 65] : [1, 8];

        test("one code of another half of the codebook", () => {
          for (const m of rows) {
            const share = caught(
              id(m),
              device,
              (inputs, next) => ({
                ...inputs,
                packed: replaced(inputs.packed!, (v) => {
                  const at = next() % (v.length - 1);
                  v[at]! ^= (next() & 1 ? 0x10 : 0x01) * (type === "nf4" ? 8 : 4);
                }),
              }),
              24,
            );
            expect(share, `m=${m}`).toBe(1);
          }
        });

        test("one neighbouring code, mostly", () => {
          for (const m of rows) {
            const share = caught(
              id(m),
              device,
              (inputs, next) => ({
                ...inputs,
                packed: replaced(inputs.packed!, (v) => {
                  v[next() % (v.length - 1)]! ^= next() & 1 ? 0x10 : 0x01;
                }),
              }),
              24,
            );
            // Two codes of FP4 are 0 and 0.005, and weights in bf16 that are scaled after the sum are a blur.
            const blurred = device === "cuda" && m <= 8 && dtype === "bf16";
            expect(share, `m=${m}`).toBeGreaterThan(blurred ? 0.3 : type === "fp4" ? 0.5 : 0.85);
          }
        });

        test("the scale of the next block, and nested scales without their offset", () => {
          for (const m of rows) {
            const other = (inputs: Record<string, Host>) => ({
              ...inputs,
              absmax: replaced(inputs.absmax!, (v) => {
                v[7] = v[8]!;
              }),
            });
            expect(caught(id(m), device, other), `m=${m}`).toBe(1);
            if (m === 65 && dtype !== "f16") continue;
            const flat = (inputs: Record<string, Host>) => ({
              ...inputs,
              offset: { ...inputs.offset!, values: [0.0205] },
            });
            expect(caught(id(m, ":nested", "n=129:k=576:bs=64"), device, flat), `m=${m}, nested`).toBe(1);
          }
        });

        test("a column that nobody multiplied, the last or another", () => {
          for (const m of rows) {
            for (const column of [k - 1, 64, 0]) {
              const dropped = (inputs: Record<string, Host>) => ({
                ...inputs,
                A: replaced(inputs.A!, (v) => {
                  for (let r = 0; r < m; r++) v[r * k + column] = 0;
                }),
              });
              expect(caught(id(m), device, dropped), `m=${m}, column ${column}`).toBe(1);
            }
          }
        });

        test("one row of activations in the place of another", () => {
          for (const m of rows.slice(1)) {
            const same = (inputs: Record<string, Host>) => ({
              ...inputs,
              A: replaced(inputs.A!, (v) => v.copyWithin((m - 1) * k, 0, k)),
            });
            expect(caught(id(m), device, same), `m=${m}`).toBe(1);
          }
        });

        test("a bias that was left out, or shifted by one", () => {
          for (const m of device === "cpu" ? [1, 65] : [1, 8]) {
            const biased = id(m, ":nested:bias", "n=129:k=576:bs=64");
            const none = (inputs: Record<string, Host>) => ({
              ...inputs,
              bias: replaced(inputs.bias!, (v) => v.fill(0)),
            });
            const shifted = (inputs: Record<string, Host>) => ({
              ...inputs,
              bias: replaced(inputs.bias!, (v) => v.copyWithin(1, 0)),
            });
            expect(caught(biased, device, none), `m=${m}`).toBe(1);
            expect(caught(biased, device, shifted), `m=${m}`).toBe(1);
          }
        });

        test("a NaN that was lost, or one where none belongs", () => {
          const nonfinite = id(3, ":nonfinite", "n=12:k=256:bs=64");
          const found = LIST.has(nonfinite) ? nonfinite : id(3, ":bias:nonfinite", "n=12:k=131:bs=64");
          const lost = (inputs: Record<string, Host>) => ({
            ...inputs,
            A: replaced(inputs.A!, (v) => {
              for (let i = 0; i < v.length; i++) if (!Number.isFinite(v[i]!)) v[i] = 1;
            }),
          });
          expect(caught(found, device, lost)).toBe(1);
          const poisoned = (inputs: Record<string, Host>) => ({
            ...inputs,
            A: replaced(inputs.A!, (v) => {
              v[3] = Number.NaN;
            }),
          });
          expect(caught(id(4), device, poisoned)).toBe(1);
        });
      });
    }
  }
}

test("the bounds of the fast path are too narrow for a wrong code, scale or column, or a missing bias", () => {
  const fast = [...LIST.keys()].filter((id) => /:m=(1|4|17):n=(17:k=127|70:k=576):bs=64.*:fast$/.test(id));
  expect(fast.length).toBe(18);
  for (const id of fast) {
    const columns = id.includes("k=127") ? 127 : 576;
    const share = caught(
      id,
      "cpu",
      (inputs, next) => ({
        ...inputs,
        packed: replaced(inputs.packed!, (v) => {
          v[next() % (v.length - 1)]! ^= (next() & 1 ? 0x10 : 0x01) * (id.includes("nf4") ? 8 : 4);
        }),
      }),
      12,
    );
    expect(share, id).toBeGreaterThan(columns === 127 ? 0.75 : 0.3);
    const scale = (inputs: Record<string, Host>) => ({
      ...inputs,
      absmax: replaced(inputs.absmax!, (v) => {
        v[7]! *= 4;
      }),
    });
    expect(caught(id, "cpu", scale), id).toBe(1);
    const dropped = (inputs: Record<string, Host>) => ({
      ...inputs,
      A: replaced(inputs.A!, (v) => {
        for (let i = columns - 1; i < v.length; i += columns) v[i] = 0;
      }),
    });
    expect(caught(id, "cpu", dropped), id).toBe(1);
    if (!id.includes("bias")) continue;
    const none = (inputs: Record<string, Host>) => ({
      ...inputs,
      bias: replaced(inputs.bias!, (v) => v.fill(0)),
    });
    expect(caught(id, "cpu", none), id).toBe(1);
  }
});

const sizesOf = (c: Case): [m: number, n: number, k: number] => {
  const size = (name: string): number => Number(new RegExp(`:${name}=(\\d+)`).exec(c.id)![1]);
  return [size("m"), size("n"), size("k")];
};

describe("a bound is wide enough for", () => {
  const f32 = Math.fround;
  const CASES = [...LIST.values()].filter(
    (c) => /m=(1|8|9):n=(7|17|100):.*bs=64(:bias)?$/.test(c.id) && c.primitive === "matmul4bit",
  );

  /** `matmul4bit` in float32, one term after the other; on path vector with codes in the dtype and scales behind the sum. */
  function summed(c: Case, inputs: Record<string, Host>, afterwards: boolean): Outputs {
    const [m, n, k] = sizesOf(c);
    const dtype = c.dtype as FloatDType;
    const values = TABLES[c.id.includes("nf4") ? "nf4" : "fp4"].values;
    const y = new Array<number>(m * n);
    for (let r = 0; r < m; r++) {
      for (let j = 0; j < n; j++) {
        let sum = 0;
        let block = 0;
        for (let i = 0; i < k; i++) {
          const at = j * k + i;
          const scale = inputs.absmax!.values[Math.floor(at / 64)]!;
          const byte = inputs.packed!.values[at >> 1]!;
          const value = values[at % 2 ? byte & 15 : byte >> 4]!;
          const a = inputs.A!.values[r * k + i]!;
          if (!afterwards) sum = f32(sum + f32(a * round(dtype, f32(value * scale))));
          else {
            block = f32(block + f32(a * round(dtype, value)));
            if ((at + 1) % 64 === 0 || i === k - 1) {
              sum = f32(sum + f32(block * scale));
              block = 0;
            }
          }
        }
        y[r * n + j] = round(dtype, f32(sum + (inputs.bias?.values[j] ?? 0)));
      }
    }
    const host: Host = { dtype, shape: [m, n], values: y };
    return { y: { dtype, shape: [m, n], bytes: hostBytes(host) } };
  }

  test("float32 sums one after the other", () => {
    expect(CASES.length).toBeGreaterThan(100);
    for (const c of CASES) {
      const inputs = c.inputs();
      for (const device of DEVICES) {
        expect(compareOutputs(c, expectedOutputs(c, inputs, device), summed(c, inputs, false))).toBeUndefined();
      }
    }
  });

  test("weights that are scaled after the sum where path vector takes them, and nowhere else", () => {
    let refused = 0;
    let taken = 0;
    let narrow = 0;
    for (const c of CASES) {
      const inputs = c.inputs();
      const outputs = summed(c, inputs, true);
      const [m, n, k] = sizesOf(c);
      const shape = { m, n, k, dtype: c.dtype as FloatDType, blocksize: 64, aligned: true };
      if (productPath("cuda", shape, "exact") === "vector") {
        taken++;
        expect(compareOutputs(c, expectedOutputs(c, inputs, "cuda"), outputs)).toBeUndefined();
      }
      // float32 weights are rounded to nothing but float32.
      if (c.dtype === "f32" || /:k=[12]:/.test(c.id)) continue;
      narrow++;
      if (compareOutputs(c, expectedOutputs(c, inputs, "cpu"), outputs)) refused++;
    }
    expect(taken).toBeGreaterThan(10);
    expect(refused / narrow).toBeGreaterThan(0.75);
  });
});

test("infinities are equal, overflow is rounding, NaN is NaN", () => {
  const { NaN: nan, POSITIVE_INFINITY: inf } = Number;
  const bound = (value: number) => sumBound("f16", { value, magnitude: value, squares: 0, count: 1, activations: 0 });
  expect(isWithin("f16", 65519, bound(65519), 65504)).toBe(true);
  expect(isWithin("f16", 65519, bound(65519), inf)).toBe(true);
  expect(isWithin("f16", 65400, 1, inf)).toBe(false);
  expect(isWithin("f16", 65519, bound(65519), -inf)).toBe(false);
  expect(isWithin("f16", 70000, bound(70000), inf)).toBe(true);
  expect(isWithin("f16", 70000, bound(70000), 65504)).toBe(false);
  expect(isWithin("f32", inf, 0, inf)).toBe(true);
  expect(isWithin("f32", inf, 0, 3e38)).toBe(false);
  expect(isWithin("f32", inf, 0, nan)).toBe(false);
  expect(isWithin("f32", nan, 0, nan)).toBe(true);
  expect(isWithin("f32", nan, 0, inf)).toBe(false);
  expect(isWithin("f32", 1, 0.1, nan)).toBe(false);
  expect(isWithin("f32", nan, inf, inf)).toBe(true);
  expect(isWithin("f32", nan, inf, 1)).toBe(false);
  for (const bad of [nan, -1, inf]) expect(() => isWithin("f32", 1, bad, 1)).toThrow(/a bound of/);
});

test("the float64 products are bitsandbytes' references", async () => {
  let count = 0;
  for (const dtype of DTYPES) {
    const file = await loadReal(`gemm4_${dtype}.safetensors`);
    for (const c of file.cases) {
      const [m, n, k] = [c.M, c.N, c.K] as [number, number, number];
      const state = c.state as Record<string, string>;
      const type = c.quant_type as "nf4" | "fp4";
      const raw = (name: string) => bytesOf(file, name).slice();
      const f32 = (name: string) => new Float32Array(raw(name).buffer);
      const meta = JSON.parse(Buffer.from(raw(state[`quant_state.bitsandbytes__${type}`]!)).toString());
      const absmax = c.nested
        ? dequantizeBlockwise(
            raw(state.absmax!),
            f32(state.nested_absmax!),
            f32(state.nested_quant_map!),
            meta.nested_blocksize,
            "f32",
            Math.fround(meta.nested_offset),
          )
        : f32(state.absmax!);
      const values = weights4bit(raw(c.packed as string), absmax, n * k, TABLES[type].values, meta.blocksize, dtype);
      const A = raw(c.A as string).buffer;
      const activations = Array.from(dtype === "f32" ? new Uint32Array(A) : new Uint16Array(A), (bits) =>
        decode(dtype, bits),
      );
      const rows = { values: activations, rowStep: k, columnStep: 1 };
      const columns = { values, rowStep: 1, columnStep: k };
      const y = product([m, n, k], rows, columns, undefined, (t) => sumBound(dtype, t));
      const reference = f32(c.ref64 as string);
      const norm = (x: ArrayLike<number>) => Math.sqrt(Array.from(x).reduce((sum, v) => sum + v * v, 0));
      const error = norm(y.values.map((v, i) => v - reference[i]!)) / norm(reference);
      expect(error, `${dtype} ${m}x${n}x${k} ${type}`).toBeLessThan(4e-8);
      count++;
    }
  }
  expect(count).toBe(16);
});
