/** Golden vectors from the cpu reference, in the format of docs/golden.md: for people who write kernels elsewhere. */
import { access, mkdir } from "node:fs/promises";
import { join, resolve } from "node:path";
import { type DType, FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { ArgumentError, FormatError } from "../core/errors.js";
import { keep, tidy } from "../core/scope.js";
import type { Shape } from "../core/shape.js";
import type { Tensor } from "../core/tensor.js";
import { missingFolders } from "../formats/folders.js";
import { SafetensorsFile } from "../formats/safetensors.js";
import { SafetensorsWriter } from "../formats/safetensors-writer.js";
import { isSafetensorsDType, type SafetensorsDType } from "../formats/source.js";
import { dequantizeBlockwise, quantizeBlockwise } from "../ops/blockwise.js";
import { fromBytes, tensor } from "../ops/create.js";
import { dequantize4bit, quantize4bit } from "../ops/fourbit.js";
import { get4bitType } from "../quant/codebooks.js";
import { formatQuantState } from "../quant/state-json.js";
import { BLOCKSIZES, NESTED_BLOCKSIZE, QUANT_TYPES, type QuantType } from "../quant/types.js";
import { CASES_KEY } from "./cases.js";
import { CODEBOOKS, type CodebookName } from "./codebooks.js";
import { floatsOf, withoutSigns } from "./float-bits.js";
import { INPUT_KINDS, type InputKind, makeInput, Random } from "./inputs.js";

/** The file that is written: the name of the primitives' own golden file. */
const FILE = "blockwise.safetensors";
/** What the metadata key `source` says in files made here. */
const SOURCE = "halfbyte, cpu reference";

const NESTED_SHAPE: Shape = [129, 257];
const WEIGHT_BLOCKSIZE = 64;
/** Decoded values are recorded for a short and a long block. */
const DEQUANT_BLOCKSIZES: Readonly<Record<"fourBit" | "blockwise", readonly number[]>> = {
  fourBit: [64, 4096],
  blockwise: [256, 4096],
};
/** The 8-bit codebooks, and the block sizes of each. */
const BLOCKWISE: Readonly<Partial<Record<CodebookName, readonly number[]>>> = {
  dynamic: BLOCKSIZES,
  udynamic: [64, 256, 4096],
  linear: [64, 256, 4096],
  fp8_e5m2: [64, 256, 4096],
  fp8_e4m3: [64, 256, 4096],
  // Nearly all of its values are zeros: the one that needs the exact search.
  normal: [64, 256, 4096],
};

export interface WriteGoldenOptions {
  /** A safe integer, not negative. The same seed gives the same bytes everywhere. */
  readonly seed: number;
  /** Overwrite a file that was not made here. Default false. */
  readonly force?: boolean;
  readonly signal?: AbortSignal;
}

export interface WrittenGolden {
  readonly path: string;
  readonly cases: number;
  readonly bytes: number;
}

/**
 * Writes DIR/blockwise.safetensors with cases of every op that the cpu reference can vouch for. A file that an earlier call
 * made is replaced; another one (vectors from somebody's hardware) only with `force`.
 * @throws ArgumentError (seed; a file that is in the way), BackendError, OutOfMemoryError, and the signal's reason
 */
export async function writeGolden(dir: string, options: WriteGoldenOptions): Promise<WrittenGolden> {
  const { seed, force = false, signal } = options;
  if (!Number.isSafeInteger(seed) || seed < 0) {
    throw new ArgumentError("writeGolden", "seed", "an integer from 0 to 2^53 - 1", String(seed));
  }
  const path = join(dir, FILE);
  if (!force && (await isForeign(path))) {
    throw new ArgumentError("writeGolden", "dir", `a folder without a ${FILE} from elsewhere (or force)`, dir);
  }
  const vectors = new Vectors(seed, signal);
  await vectors.codebooks();
  for (const dtype of FLOAT_DTYPES) for (const kind of INPUT_KINDS) await vectors.input(kind, dtype);
  for (const dtype of FLOAT_DTYPES) for (const quantType of QUANT_TYPES) await vectors.nested(dtype, quantType);

  for (const folder of missingFolders(resolve(dir))) await mkdir(folder);
  const metadata = { source: SOURCE, seed: String(seed), [CASES_KEY]: JSON.stringify(vectors.cases) };
  const declarations = [...vectors.tensors].map(([name, { dtype, shape }]) => ({ name, dtype, shape }));
  const writer = new SafetensorsWriter(path, declarations, metadata);
  try {
    for (const [name, { bytes }] of vectors.tensors) await writer.write(name, bytes);
    signal?.throwIfAborted();
    await writer.commit();
  } finally {
    await writer.abort();
  }
  return { path, cases: vectors.cases.length, bytes: writer.dataBytes };
}

/** Whether there is something at `path` that this command did not write. */
async function isForeign(path: string): Promise<boolean> {
  const exists = await access(path).then(
    () => true,
    () => false,
  );
  if (!exists) return false;
  try {
    const file = await SafetensorsFile.open(path);
    await file.close();
    return file.metadata.get("source") !== SOURCE;
  } catch (error) {
    if (error instanceof FormatError) return true;
    throw error;
  }
}

interface Stored {
  readonly dtype: SafetensorsDType;
  readonly shape: Shape;
  readonly bytes: Uint8Array;
}

/** The file's content while it grows. */
class Vectors {
  readonly tensors = new Map<string, Stored>();
  readonly cases: object[] = [];

  constructor(
    private readonly seed: number,
    private readonly signal: AbortSignal | undefined,
  ) {}

  async codebooks(): Promise<void> {
    for (const [name, make] of Object.entries(CODEBOOKS)) {
      const values = make();
      const code = this.put(`code/${name}`, "f32", [values.length], new Uint8Array(values.buffer));
      this.cases.push({ op: "codebook", name, code });
    }
  }

  /** One input, and what every 4-bit and 8-bit quantizer makes of it. */
  async input(kind: InputKind, dtype: FloatDType): Promise<void> {
    const codes = Object.keys(BLOCKWISE).map((name) => CODEBOOKS[name as CodebookName]());
    const values = makeInput(kind, dtype, new Random(this.seed, `${kind}/${dtype}`), codes);
    const x = keep(tidy(() => tensor(values, { device: "cpu" }).to(dtype)));
    try {
      const bytes = await x.bytes();
      const input = this.put(`x/${dtype}/${kind}`, dtype, x.shape, bytes);
      const common = { dtype, input };
      for (const quantType of QUANT_TYPES) {
        for (const blocksize of BLOCKSIZES) await this.fourBit(x, quantType, blocksize, `${dtype}/${kind}`, common);
      }
      for (const [name, blocksizes] of Object.entries(BLOCKWISE)) {
        for (const blocksize of blocksizes) {
          await this.blockwise(dtype, bytes, name as CodebookName, blocksize, `${dtype}/${kind}`, common);
        }
      }
    } finally {
      x.dispose();
    }
  }

  private async fourBit(x: Tensor, quantType: QuantType, blocksize: number, stem: string, common: object) {
    const decoded = DEQUANT_BLOCKSIZES.fourBit.includes(blocksize);
    const tensors = await this.compute(`q4/${stem}/${quantType}/${blocksize}`, () => {
      const [packed, state] = quantize4bit(x, { quantType, blocksize });
      const results: Record<string, Tensor> = { packed, absmax: state.absmax };
      if (decoded) results.dequant = dequantize4bit(packed, state);
      return results;
    });
    this.cases.push({ op: "quantize_4bit", ...common, quant_type: quantType, blocksize, ...tensors });
  }

  /** An unsigned codebook takes the input's absolute value. */
  private async blockwise(
    dtype: FloatDType,
    bytes: Uint8Array<ArrayBuffer>,
    name: CodebookName,
    blocksize: number,
    stem: string,
    common: object,
  ) {
    const code = CODEBOOKS[name]();
    const absInput = code[0]! >= 0;
    const decoded = DEQUANT_BLOCKSIZES.blockwise.includes(blocksize);
    const operand = absInput ? withoutSigns(dtype, bytes) : bytes;
    const tensors = await this.compute(`q8/${stem}/${name}/${blocksize}`, () => {
      const shape = [floatsOf(dtype, operand).length];
      const x = fromBytes(operand, { dtype, shape, device: "cpu" });
      const [q, state] = quantizeBlockwise(x, { code, blocksize });
      const results: Record<string, Tensor> = { q, absmax: state.absmax };
      if (decoded) results.dequant = dequantizeBlockwise(q, state);
      return results;
    });
    const parameters = { ...common, abs_input: absInput, code: `code/${name}`, blocksize };
    this.cases.push({ op: "quantize_blockwise", ...parameters, ...tensors });
  }

  async nested(dtype: FloatDType, quantType: QuantType): Promise<void> {
    const stem = `nested/${dtype}/${quantType}`;
    const random = new Random(this.seed, stem);
    const values = Float32Array.from({ length: NESTED_SHAPE[0]! * NESTED_SHAPE[1]! }, () => random.normal());
    const blocksize = WEIGHT_BLOCKSIZE;
    const { offset, absmax, nested_absmax, ...tensors } = await this.compute(stem, () => {
      const x = tensor(values, { shape: NESTED_SHAPE, device: "cpu" }).to(dtype);
      const [packed, state] = quantize4bit(x, { quantType, blocksize, compressStatistics: true });
      const state2 = state.state2!;
      const dequant = dequantize4bit(packed, state);
      const scales = { absmax: state.absmax, nested_absmax: state2.absmax, offset: state.offset!.reshape([1]) };
      return { input: x, packed, dequant, ...scales };
    });
    const mean = floatsOf("f32", this.tensors.get(offset)!.bytes)[0]!;
    const nested = { blocksize: NESTED_BLOCKSIZE, dtype: "f32", offset: mean } as const;
    const json = formatQuantState({ quantType, blocksize, dtype, shape: NESTED_SHAPE, nested });
    const key = `quant_state.bitsandbytes__${quantType}`;
    const map = new Uint8Array(get4bitType(quantType).buffer);
    const nestedMap = new Uint8Array(CODEBOOKS.dynamic().buffer);
    const state = {
      absmax,
      quant_map: this.put(`${stem}/quant_map`, "f32", [map.length / 4], map),
      nested_absmax,
      nested_quant_map: this.put(`${stem}/nested_quant_map`, "f32", [nestedMap.length / 4], nestedMap),
      [key]: this.put(`${stem}/${key}`, "u8", [json.length], json),
    };
    const parameters = { dtype, quant_type: quantType, blocksize, shape: NESTED_SHAPE };
    this.cases.push({ op: "quantize_4bit_nested", ...parameters, ...tensors, offset, state });
  }

  /** Runs ops, stores their results under `stem/KEY`, and gives the names back. */
  private async compute<T extends Readonly<Record<string, Tensor>>>(
    stem: string,
    ops: () => T,
  ): Promise<{ [K in keyof T]: string }> {
    this.signal?.throwIfAborted();
    const results = Object.entries(tidy(ops));
    try {
      const names: Record<string, string> = {};
      for (const [key, t] of results) names[key] = this.put(`${stem}/${key}`, t.dtype, t.shape, await t.bytes());
      return names as { [K in keyof T]: string };
    } finally {
      for (const [, t] of results) t.dispose();
    }
  }

  private put(name: string, dtype: DType, shape: Shape, bytes: Uint8Array): string {
    const stored = dtype.toUpperCase();
    if (!isSafetensorsDType(stored)) throw new TypeError(`safetensors has no ${dtype}`);
    this.tensors.set(name, { dtype: stored, shape, bytes });
    return name;
  }
}
