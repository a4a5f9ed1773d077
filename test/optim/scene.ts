/** What the tests of optimizers share. */
import { afterAll, beforeAll, describe } from "vitest";
import type { Backend } from "#halfbyte/core/backend.js";
import type { FloatDType } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import * as halfbyte from "#halfbyte/index.js";
import { DEVICES, expectNothingLeft, type GuardedBackend, makeBackend } from "../helpers/backends.js";

/** Runs tests on every device, each with a backend of its own that has nothing left afterwards. */
export function onDevices(title: string, use: (backend: GuardedBackend) => void, body: () => void): void {
  for (const { device, missing } of DEVICES) {
    describe.skipIf(missing)(`${title} on ${device}${missing ? ` (skipped: ${missing})` : ""}`, () => {
      let backend: GuardedBackend;
      beforeAll(() => {
        backend = makeBackend(device);
        use(backend);
      });
      afterAll(async () => {
        await backend.synchronize();
        expectNothingLeft(backend);
        await backend.close();
      });
      body();
    });
  }
}

export const RULE_NAMES = ["Adam", "AdamW", "AdEMAMix", "LAMB", "SGD", "LARS", "RMSprop", "Adagrad", "Lion"] as const;
export type RuleName = (typeof RULE_NAMES)[number];
export const VARIANTS = ["", "8bit", "32bit"] as const;

export type AnyOptions = Readonly<Record<string, unknown>>;
export type AnyClass = new (params: unknown, options?: AnyOptions) => halfbyte.Optimizer;

export function classOf(name: string): AnyClass {
  return (halfbyte as unknown as Record<string, AnyClass>)[name]!;
}

/** Options without which a class does not construct. */
export function needed(rule: string): AnyOptions {
  return rule === "SGD" || rule === "LARS" ? { lr: 0.05, momentum: 0.9 } : {};
}

/** Every class: 9 rules, free or fixed bits, paged or not. */
export const CLASSES = RULE_NAMES.flatMap((rule) =>
  ["", "Paged"].flatMap((paged) =>
    VARIANTS.map((bits) => ({ name: `${paged}${rule}${bits}`, rule, paged: paged !== "", bits })),
  ),
);

/** Numbers from -1 to 1 that a seed decides. */
export function numbers(n: number, seed: number): Float32Array<ArrayBuffer> {
  let state = (seed * 2654435761 + 12345) >>> 0;
  return Float32Array.from({ length: n }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  });
}

export function parameter<D extends FloatDType = "f32">(
  backend: Backend,
  shape: readonly number[],
  seed: number,
  dtype?: D,
): Tensor<D> {
  const size = shape.reduce((a, b) => a * b, 1);
  return Tensor.allocate(backend, dtype ?? ("f32" as D), shape).copyFrom(numbers(size, seed));
}

/** Gives every parameter the gradient of a step. */
export function setGradients(params: readonly Tensor[], step: number, dtype?: FloatDType): void {
  params.forEach((p, i) => {
    p.grad?.dispose();
    const g = Tensor.allocate(p.backend, dtype ?? (p.dtype as FloatDType), p.shape);
    p.grad = g.copyFrom(numbers(p.size, 1000 * step + i));
  });
}

export function dropGradients(params: readonly Tensor[]): void {
  for (const p of params) {
    p.grad?.dispose();
    p.grad = null;
  }
}

export function dispose(...groups: readonly (readonly { dispose(): void }[])[]): void {
  for (const group of groups) for (const each of group) each.dispose();
}

/** The bits of several tensors. */
export function bitsOf(tensors: readonly Tensor[]): string[] {
  return tensors.map((tensor) => Buffer.from(tensor.bytesSync()).toString("base64"));
}

/** Disposes the tensors of a state dict. */
export function disposeDict(dict: halfbyte.OptimizerStateDict): void {
  for (const entries of Object.values(dict.state)) {
    for (const value of Object.values(entries)) if (value instanceof Tensor) value.dispose();
  }
}
