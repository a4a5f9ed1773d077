/**
 * The optimizers train: a network of two layers on a real data set, gradients written out by hand. A broken update shows: without its sign
 * or its scale a state of 8 bits ends far from the loss that one of 32 bits reaches.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { Backend } from "#halfbyte/index.js";
import * as halfbyte from "#halfbyte/index.js";
import { DEVICES, expectNothingLeft, type GuardedBackend, makeBackend } from "../helpers/backends.js";
import { digits, Network, type Score, train } from "./digits.js";

const EPOCHS = 20;
const STEPS = EPOCHS * Math.ceil(digits().train.count / 128);
/** Both weights have states of 8 bits, the biases of 32. */
const MIN_8BIT_SIZE = 1024;

type Options = Readonly<Record<string, unknown>>;
type Bits = 8 | 32;
/** Settings for which 8 and 32 bits train alike: one learning rate tried in steps of two or three, eps 1e-6 (see docs/optimizers.md). */
const FAMILIES: Readonly<Record<string, Options>> = {
  Adam: { lr: 0.01, eps: 1e-6 },
  AdamW: { lr: 0.01, eps: 1e-6, weightDecay: 0.01 },
  SGD: { lr: 0.2, momentum: 0.9 },
  RMSprop: { lr: 0.005, alpha: 0.99, eps: 1e-6 },
  Adagrad: { lr: 0.03 },
  Lion: { lr: 0.003 },
  AdEMAMix: { lr: 0.005, eps: 1e-6, weightDecay: 0, tAlpha: STEPS, tBeta3: STEPS },
  LAMB: { lr: 0.03, eps: 1e-6 },
  LARS: { lr: 1, momentum: 0.9 },
};

function optimizerOf(name: string, bits: Bits, network: Network): halfbyte.Optimizer {
  const make = (halfbyte as unknown as Record<string, new (params: unknown, options: Options) => halfbyte.Optimizer>)[
    `${name}${bits}bit`
  ]!;
  return new make(network.parameters, { ...FAMILIES[name], min8bitSize: MIN_8BIT_SIZE });
}

/** Sets the learning rate and makes a step. */
function stepper(optimizer: halfbyte.Optimizer): (factor: number) => void {
  const lr = optimizer.paramGroups[0]!.lr;
  return (factor) => {
    optimizer.paramGroups[0]!.lr = lr * factor;
    optimizer.step();
  };
}

interface Trained {
  readonly before: Score;
  readonly train: Score;
  readonly test: Score;
  readonly stateBytes: number;
}

function trained(backend: Backend, name: string, bits: Bits, seed: number): Trained {
  const network = new Network(backend, seed);
  const optimizer = optimizerOf(name, bits, network);
  try {
    const before = network.score(digits().train);
    train(network, stepper(optimizer), { seed, epochs: EPOCHS });
    const [ended, tested] = [network.score(digits().train), network.score(digits().test)];
    return { before, train: ended, test: tested, stateBytes: optimizer.stateBytes };
  } finally {
    optimizer.dispose();
    network.dispose();
  }
}

const mean = (values: readonly number[]): number => values.reduce((sum, value) => sum + value, 0) / values.length;

for (const { device, missing } of DEVICES) {
  describe.skipIf(missing)(`training on ${device}${missing ? ` (skipped: ${missing})` : ""}`, () => {
    let backend: GuardedBackend;
    const folder = mkdtempSync(join(tmpdir(), "halfbyte-train-"));
    beforeAll(() => {
      backend = makeBackend(device);
    });
    afterAll(async () => {
      expectNothingLeft(backend);
      await backend.close();
      rmSync(folder, { recursive: true });
    });

    test("8-bit Adam ends within 1 % of the loss of 32-bit Adam, the mean of five seeds", () => {
      const losses = ([32, 8] as const).map((bits) =>
        [1, 2, 3, 4, 5].map((seed) => {
          const { before, train, stateBytes } = trained(backend, "Adam", bits, seed);
          expect(before.loss).toBeGreaterThan(2);
          // Weights of 8192 + 1280 elements with 37 scales, biases of 138 with 4 bytes: twice.
          expect(stateBytes).toBe(bits === 32 ? 2 * 4 * 9610 : 2 * (9472 + 4 * 37 + 4 * 138));
          return train.loss;
        }),
      );
      const [wide, narrow] = losses.map(mean) as [number, number];
      console.log(`${device}: loss of Adam with 32 bits ${wide.toFixed(5)}, with 8 ${narrow.toFixed(5)}`);
      expect(Math.abs(narrow / wide - 1), `32 bits ${losses[0]}, 8 bits ${losses[1]}`).toBeLessThan(0.01);
      expect(losses[0], "8 bits are not 32").not.toEqual(losses[1]);
    });

    test.each(Object.keys(FAMILIES))("%s reaches 0.98 in training and 0.95 in the test, with 8 and 32 bits", (name) => {
      for (const bits of [32, 8] as const) {
        for (const seed of [1, 2]) {
          const { before, train, test } = trained(backend, name, bits, seed);
          const line = `${device}: ${name}${bits}bit, seed ${seed}: loss ${train.loss.toFixed(4)}, ${(100 * train.accuracy).toFixed(1)} %, test ${(100 * test.accuracy).toFixed(1)} %`;
          if (process.env.HALFBYTE_TRAIN_PRINT) console.log(line);
          expect(before.accuracy, "before training").toBeLessThan(0.3);
          expect(train.accuracy, line).toBeGreaterThanOrEqual(0.98);
          expect(test.accuracy, line).toBeGreaterThanOrEqual(0.95);
        }
      }
    });

    test.each(Object.keys(FAMILIES))("%s goes on from a file as if nothing had been, bit for bit", async (name) => {
      for (const bits of [32, 8] as const) {
        const [seed, epochs, middle] = [3, 4, 2];
        const network = new Network(backend, seed);
        const optimizer = optimizerOf(name, bits, network);
        train(network, stepper(optimizer), { seed, epochs, end: middle });
        // The pause: parameters and a file are all that is left.
        const file = join(folder, `${name}${bits}.safetensors`);
        await optimizer.save(file);
        const other = new Network(backend, seed + 1);
        for (const [i, p] of other.parameters.entries()) p.copyFrom(network.parameters[i]!);
        const resumed = optimizerOf(name, bits, other);
        await resumed.load(file);
        const fresh = new Network(backend, seed + 1);
        for (const [i, p] of fresh.parameters.entries()) p.copyFrom(network.parameters[i]!);
        const forgetful = optimizerOf(name, bits, fresh);

        for (const [net, opt] of [
          [network, optimizer],
          [other, resumed],
          [fresh, forgetful],
        ] as const) {
          // What a learning rate was set to is in the file as well.
          opt.paramGroups[0]!.lr = FAMILIES[name]!.lr as number;
          train(net, stepper(opt), { seed, epochs, begin: middle });
        }
        const bytes = (net: Network): Buffer => Buffer.concat(net.parameters.map((p) => p.bytesSync()));
        expect(Buffer.compare(bytes(other), bytes(network)), `${name}${bits}bit`).toBe(0);
        expect(Buffer.compare(bytes(fresh), bytes(network)), `${name}${bits}bit without its states`).not.toBe(0);
        for (const opt of [optimizer, resumed, forgetful]) opt.dispose();
        for (const net of [network, other, fresh]) net.dispose();
      }
    });
  });
}
