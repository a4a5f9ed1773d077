/** A network of two layers on handwritten digits, with its gradients written out: what the optimizers are tried on. */
import { readFileSync } from "node:fs";
import { gunzipSync } from "node:zlib";
import { type Backend, matmul, Tensor, tidy } from "#halfbyte/index.js";
import { random } from "../helpers/random.js";

const PIXELS = 64;
const CLASSES = 10;
const MOST = 16;
const BATCH = 128;
/** Of every five images one is for testing. */
const TEST_EVERY = 5;
const HIDDEN = 128;
/** Half of this times the weights' squares is added to the loss: there is a least loss then, which a training comes near. */
const PENALTY = 1e-3;

interface Part {
  readonly count: number;
  /** [count, PIXELS], -1 to 1. */
  readonly images: Float32Array<ArrayBuffer>;
  readonly labels: Uint8Array;
}

/** 1,797 images by E. Alpaydin and C. Kaynak: test/interop/digits.py says where they come from. */
function read(): { train: Part; test: Part } {
  const bytes = gunzipSync(readFileSync(new URL("../fixtures/digits.bin.gz", import.meta.url)));
  const record = PIXELS + 1;
  const part = (take: (i: number) => boolean): Part => {
    const chosen = Array.from({ length: bytes.length / record }, (_, i) => i).filter(take);
    const images = new Float32Array(chosen.length * PIXELS);
    for (const [row, i] of chosen.entries()) {
      for (let k = 0; k < PIXELS; k++) images[row * PIXELS + k] = (2 * bytes[i * record + k]!) / MOST - 1;
    }
    return { count: chosen.length, images, labels: Uint8Array.from(chosen, (i) => bytes[i * record + PIXELS]!) };
  };
  return { train: part((i) => i % TEST_EVERY !== 0), test: part((i) => i % TEST_EVERY === 0) };
}

let data: ReturnType<typeof read> | undefined;
export function digits(): ReturnType<typeof read> {
  data ??= read();
  return data;
}

export interface Score {
  /** Mean cross entropy, with the penalty. */
  readonly loss: number;
  /** Share of images that are recognized. */
  readonly accuracy: number;
}

/** 64 pixels, 128 rectified, 10 classes: 9,610 parameters in four tensors as in torch.nn.Linear, [out, in], uniform within 1/sqrt(in). */
export class Network {
  readonly w1: Tensor<"f32">;
  readonly b1: Tensor<"f32">;
  readonly w2: Tensor<"f32">;
  readonly b2: Tensor<"f32">;

  constructor(
    private readonly backend: Backend,
    seed: number,
  ) {
    const next = random(`weights ${seed}`);
    const uniform = (shape: readonly number[], inputs: number): Tensor<"f32"> => {
      const t = Tensor.allocate(backend, "f32", shape);
      const values = Float32Array.from({ length: t.size }, () => ((next() / 2 ** 32) * 2 - 1) / Math.sqrt(inputs));
      t.grad = Tensor.allocate(backend, "f32", shape);
      return t.copyFrom(values);
    };
    this.w1 = uniform([HIDDEN, PIXELS], PIXELS);
    this.b1 = uniform([HIDDEN], PIXELS);
    this.w2 = uniform([CLASSES, HIDDEN], HIDDEN);
    this.b2 = uniform([CLASSES], HIDDEN);
  }

  get parameters(): Tensor<"f32">[] {
    return [this.w1, this.b1, this.w2, this.b2];
  }

  /** Puts the gradients of the batch's loss into `grad` of the parameters. */
  gradients(images: Float32Array<ArrayBuffer>, labels: Uint8Array): void {
    const count = labels.length;
    tidy(() => {
      const x = this.put(images, [count, PIXELS]);
      const { hidden, h, probabilities } = this.forward(x);
      for (const [i, label] of labels.entries()) probabilities[i * CLASSES + label]! -= 1;
      const dz2 = probabilities.map((value) => value / count);
      const onto = this.put(dz2, [count, CLASSES]);
      const dz1 = matmul(onto, this.w2).dataSync();
      for (let i = 0; i < dz1.length; i++) if (hidden[i]! <= 0) dz1[i] = 0;
      set(this.w2, withPenalty(matmul(onto, h, { transposeA: true }), this.w2));
      set(this.b2, columnSums(dz2, CLASSES));
      set(this.w1, withPenalty(matmul(this.put(dz1, [count, HIDDEN]), x, { transposeA: true }), this.w1));
      set(this.b1, columnSums(dz1, HIDDEN));
    });
  }

  score({ count, images, labels }: Part): Score {
    const probabilities: Float32Array[] = [];
    tidy(() => void probabilities.push(this.forward(this.put(images, [count, PIXELS])).probabilities));
    let [loss, right] = [0, 0];
    for (const [i, label] of labels.entries()) {
      const row = probabilities[0]!.subarray(i * CLASSES, (i + 1) * CLASSES);
      loss -= Math.log(row[label]!);
      if (row.indexOf(Math.max(...row)) === label) right++;
    }
    const squares = [this.w1, this.w2].flatMap((w) => [...w.dataSync()]).reduce((sum, value) => sum + value ** 2, 0);
    return { loss: loss / count + (PENALTY / 2) * squares, accuracy: right / count };
  }

  dispose(): void {
    for (const p of this.parameters) {
      p.grad?.dispose();
      p.dispose();
    }
  }

  private forward(x: Tensor<"f32">) {
    const hidden = matmul(x, this.w1, { transposeB: true, bias: this.b1 }).dataSync();
    const h = this.put(
      hidden.map((value) => Math.max(value, 0)),
      [hidden.length / HIDDEN, HIDDEN],
    );
    const probabilities = matmul(h, this.w2, { transposeB: true, bias: this.b2 }).dataSync();
    for (let at = 0; at < probabilities.length; at += CLASSES) softmax(probabilities.subarray(at, at + CLASSES));
    return { hidden, h, probabilities };
  }

  private put(values: Float32Array, shape: readonly number[]): Tensor<"f32"> {
    return Tensor.allocate(this.backend, "f32", shape).copyFrom(values);
  }
}

function set(p: Tensor, gradient: Float32Array): void {
  p.grad!.copyFrom(gradient);
}

function withPenalty(gradient: Tensor<"f32">, w: Tensor<"f32">): Float32Array {
  const values = w.dataSync();
  return gradient.dataSync().map((value, i) => value + PENALTY * values[i]!);
}

function softmax(row: Float32Array): void {
  const most = Math.max(...row);
  let sum = 0;
  for (let i = 0; i < row.length; i++) {
    row[i] = Math.exp(row[i]! - most);
    sum += row[i]!;
  }
  for (let i = 0; i < row.length; i++) row[i]! /= sum;
}

function columnSums(values: Float32Array, columns: number): Float32Array {
  const sums = new Float32Array(columns);
  for (let i = 0; i < values.length; i++) sums[i % columns]! += values[i]!;
  return sums;
}

/**
 * Epochs [begin, end) of a training of `epochs`: the order of the images depends on the seed and the epoch alone. `step` is called with
 * the gradients in their places, and with what the learning rate is to be multiplied by: it falls in a line to 0.
 */
export function train(
  network: Network,
  step: (factor: number) => void,
  { seed, epochs, begin = 0, end = epochs }: { seed: number; epochs: number; begin?: number; end?: number },
): void {
  const { count, images, labels } = digits().train;
  const steps = Math.ceil(count / BATCH);
  for (let epoch = begin; epoch < end; epoch++) {
    const next = random(`order ${seed} ${epoch}`);
    const order = Array.from({ length: count }, (_, i) => [next(), i] as const).sort((a, b) => a[0] - b[0]);
    for (let i = 0; i < steps; i++) {
      const rows = order.slice(i * BATCH, (i + 1) * BATCH).map(([, row]) => row);
      const batch = new Float32Array(rows.length * PIXELS);
      for (const [to, row] of rows.entries()) batch.set(images.subarray(row * PIXELS, (row + 1) * PIXELS), to * PIXELS);
      network.gradients(
        batch,
        Uint8Array.from(rows, (row) => labels[row]!),
      );
      step(1 - (epoch * steps + i) / (epochs * steps));
    }
  }
}
