/** A first step in float64, from states of zeros: what a bench's step is held to before it is timed on the cpu. */
import type { Tensor } from "#halfbyte/core/tensor.js";
import type { SettingName } from "./optimizer.bench.js";

const EPS = 1e-8;
const ALPHA = 5;
const BETA3 = 0.9999;
/** RMSprop's. */
const DECAY_RATE = 0.99;
const WEIGHT_DECAY = 0.01;
const MOST_NORM = { LAMB: 1, LARS: 0.02 } as const;

/** The update of an element, without the learning rate: bias corrections make the moments those of the gradient. */
function direction(name: SettingName, g: number): number {
  const unit = g / (Math.abs(g) + EPS);
  switch (name) {
    case "Adam":
    case "AdamW":
    case "Adagrad":
    case "LAMB":
      return unit;
    case "AdEMAMix":
      return unit * (1 + ALPHA * (1 - BETA3));
    case "RMSprop":
      return g / (Math.sqrt(1 - DECAY_RATE) * Math.abs(g) + EPS);
    case "SGD":
    case "LARS":
      return g;
    case "Lion":
      return Math.sign(g);
  }
}

const floats = (t: Tensor): Float32Array => {
  const wide = t.dtype === "f32" ? undefined : t.to("f32");
  const values = (wide ?? t).dataSync() as Float32Array;
  wide?.dispose();
  return values;
};
const norm = (values: Float64Array): number => Math.sqrt(values.reduce((sum, x) => sum + x * x, 0));

/** Takes the step and says where a parameter is not what it should be. */
export function checkFirstStep(
  name: SettingName,
  lr: number,
  p: Tensor,
  g: Tensor,
  step: () => void,
): string | undefined {
  const before = floats(p);
  const updates = Float64Array.from(floats(g), (value) => direction(name, value));
  step();
  const after = floats(p);
  let ratio = 1;
  if (name === "LAMB" || name === "LARS") {
    ratio = Math.min(1, (MOST_NORM[name] * norm(Float64Array.from(before))) / norm(updates));
  }
  const decay = name === "AdamW" ? 1 - lr * WEIGHT_DECAY : 1;
  // Half an ulp of the parameter for each of two roundings, and the update's own.
  const ulp = p.dtype === "bf16" ? 2 ** -8 : 2 ** -23;
  let changed = 0;
  for (let i = 0; i < after.length; i++) {
    const update = lr * ratio * updates[i]!;
    const want = (before[i]! - update) * decay;
    const limit = 1.1 * ulp * Math.max(Math.abs(before[i]!), Math.abs(want)) + 1e-4 * Math.abs(update) + 1e-30;
    // Also true of NaN.
    if (!(Math.abs(after[i]! - want) <= limit)) return `element ${i}: ${after[i]} instead of ${want}`;
    if (after[i] !== before[i]) changed++;
  }
  return changed > after.length / 8 ? undefined : `only ${changed} of ${after.length} elements changed`;
}
