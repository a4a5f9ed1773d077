/**
 * The products over a real model's linear layers, for test/interop/check_products.py: quantizes every layer to NF4 and to int8,
 * multiplies it with seeded activations, and writes operands and results as safetensors. Needs nothing but the built package.
 *
 *     node test/interop/products.mjs MODEL OUT_DIR [--device cpu|cuda] [--layers N] [--results-only] [--dtypes bf16,f16,f32]
 *
 * MODEL is a Hugging Face folder or a GGUF file. OUT_DIR gets operands-NN.safetensors and results-NN.safetensors, a pair for a few
 * decoder layers each; --layers takes the first N decoder layers only. Operands are the same bytes on every device and machine:
 * with --results-only (on a machine with a GPU, say) they are not written, and the folder of another run has them. A hash in both
 * files says whether they belong together. --dtypes: of the activations to multiply with.
 */
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { checkSettings, planModel } from "../../dist/checkpoint/plan.js";
import { SafetensorsWriter } from "../../dist/formats/safetensors-writer.js";
import { Random } from "../../dist/golden/inputs.js";
import * as halfbyte from "../../dist/index.js";

const { int8VectorwiseQuant, matmul4bit, matmul8bit, quantize4bit, tensor, tidy } = halfbyte;

const SEED = 5;
/** Rows of the activations: one as when a token is generated, then many together as in a prompt. */
const ROWS = [1, 37];
/** The dtypes of activations: of 4-bit products, and of int8 products (LLM.int8() is for 16 bits). */
const FOUR_BIT_DTYPES = ["bf16", "f16", "f32"];
const INT8_DTYPES = ["bf16", "f16"];
const THRESHOLD = 6;
/** Decoder layers of a pair of files. */
const SHARD = 4;
/** One column in so many has activations so much larger than the others, as a few have in every transformer. */
const OUTLIERS = 96;
const OUTLIER_GAIN = 12;

const IN_SAFETENSORS = { u8: "U8", i8: "I8", f32: "F32", bf16: "BF16", f16: "F16" };
const FROM_SAFETENSORS = { F32: "f32", BF16: "bf16", F16: "f16" };

/** Hidden states as a norm leaves them: about normal, columns of unlike size, a few of them large. */
function activations(name, columns) {
  const random = new Random(SEED, name);
  const gains = Array.from({ length: columns }, () => {
    const gain = 2 ** (random.normal() / 2);
    return random.next() % OUTLIERS === 0 ? gain * OUTLIER_GAIN : gain;
  });
  const rows = ROWS.reduce((sum, count) => sum + count);
  return Float32Array.from({ length: rows * columns }, (_, i) => random.normal() * gains[i % columns]);
}

/** Launches all of one weight; gives reads of its operands and of its results. */
function launch({ name, dtype, shape }, bytes, device, dtypes) {
  return tidy(() => {
    const operands = [];
    const results = [];
    const read = (list, key, t) =>
      list.push({ name: `${name}.${key}`, dtype: IN_SAFETENSORS[t.dtype], shape: t.shape, bytes: t.bytes() });
    const weight = halfbyte.fromBytes(bytes, { dtype: FROM_SAFETENSORS[dtype], shape });
    // As `halfbyte quantize` does: 4 bits from bf16, int8 from f16.
    const [packed, state] = quantize4bit(weight.to("bf16"), { quantType: "nf4" });
    const [codes, scale] = int8VectorwiseQuant(weight.to("f16"));
    read(operands, "packed", packed);
    read(operands, "absmax", state.absmax);
    read(operands, "codes", codes);
    read(operands, "scale", scale);

    const columns = shape[1];
    const values = activations(name, columns);
    for (const dtype of FOUR_BIT_DTYPES) {
      const x = tensor(values, { dtype, shape: [values.length / columns, columns] });
      read(operands, `x.${dtype}`, x);
      if (!dtypes.includes(dtype)) continue;
      let row = 0;
      for (const rows of ROWS) {
        const part = x.slice(row, row + rows);
        row += rows;
        read(results, `exact.${dtype}.${rows}`, matmul4bit(part, packed, state));
        // The cpu has a second way.
        if (device === "cpu") read(results, `fast.${dtype}.${rows}`, matmul4bit(part, packed, state, { mode: "fast" }));
        if (!INT8_DTYPES.includes(dtype)) continue;
        read(results, `int8.${dtype}.${rows}`, matmul8bit(part, codes, scale, { threshold: THRESHOLD }));
      }
    }
    return { operands, results };
  });
}

const settled = (tensors) => Promise.all(tensors.map(async (t) => ({ ...t, bytes: await t.bytes })));

function fingerprint(tensors) {
  const hash = createHash("sha256");
  for (const { name, bytes } of tensors) hash.update(name).update(bytes);
  return hash.digest("hex");
}

async function save(path, tensors, metadata) {
  const writer = new SafetensorsWriter(path, tensors, metadata);
  try {
    for (const { name, bytes } of tensors) await writer.write(name, bytes);
    await writer.commit();
  } catch (error) {
    await writer.abort();
    throw error;
  }
}

async function main() {
  const { values: options, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      device: { type: "string", default: "cpu" },
      layers: { type: "string" },
      dtypes: { type: "string", default: FOUR_BIT_DTYPES.join(",") },
      "results-only": { type: "boolean", default: false },
    },
  });
  const [path, out] = positionals;
  if (out === undefined)
    throw new Error("usage: products.mjs MODEL OUT_DIR [--device D] [--layers N] [--results-only]");
  const started = performance.now();
  const backend = await halfbyte.init({ device: options.device });
  const source = await halfbyte.openModel(path);
  const quantized = planModel(source, checkSettings({ type: "nf4" })).tensors.filter((t) => t.action === "quantize");
  const layers = new Map();
  for (const { tensor } of quantized) {
    const layer = Number(/\.(\d+)\./.exec(tensor.name)?.[1]);
    layers.set(layer, [...(layers.get(layer) ?? []), tensor]);
  }
  const wanted = [...layers.keys()].sort((a, b) => a - b).slice(0, Number(options.layers ?? layers.size));
  mkdirSync(out, { recursive: true });
  for (const file of readdirSync(out)) if (/^(operands|results)-\d+\.safetensors$/.test(file)) rmSync(join(out, file));

  let count = 0;
  for (let begin = 0; begin < wanted.length; begin += SHARD) {
    const operands = [];
    const results = [];
    for (const layer of wanted.slice(begin, begin + SHARD)) {
      for (const weight of layers.get(layer)) {
        const bytes = await source.readRows(weight.name, 0, weight.shape[0]);
        const reads = launch(weight, bytes, backend.device, options.dtypes.split(","));
        operands.push(...(await settled(reads.operands)));
        results.push(...(await settled(reads.results)));
        count++;
      }
    }
    const metadata = { format: "pt", device: backend.device, threshold: String(THRESHOLD), rows: ROWS.join(",") };
    metadata.operands = fingerprint(operands);
    const name = (kind) => join(out, `${kind}-${String(begin / SHARD).padStart(2, "0")}.safetensors`);
    if (!options["results-only"]) await save(name("operands"), operands, metadata);
    await save(name("results"), results, metadata);
  }
  await source.close();
  await halfbyte.shutdown();
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  console.log(`${count} linear layers of ${path} on ${backend.device}: ${out} (${seconds} s)`);
}

await main();
