/**
 * A GGUF file as a Hugging Face model: parameters under transformers' names and in its row order, dequantized row slice
 * by row slice, config.json, generation_config.json and the tokenizer's files.
 */
import { ArgumentError, DisposedError, UnsupportedError } from "../core/errors.js";
import { type GgufHeader, openGguf } from "./gguf.js";
import { generationConfig, modelConfig } from "./gguf-config.js";
import { checkDequantizable, dequantizeGguf } from "./gguf-dequant.js";
import { type MappedTensor, mapTensors, readHyperparameters } from "./gguf-layout.js";
import { readGgufTokenizer, tokenizerFiles } from "./gguf-tokenizer.js";
import { GGML_TYPES, type GgmlType } from "./gguf-types.js";
import { type ModelSource, rowBytes, rowCount, rowRange, type SourceTensor } from "./source.js";

/** A `ModelSource` that also says what the file holds. */
export interface GgufModelSource extends ModelSource {
  readonly kind: "gguf";
  /** Metadata and tensors under ggml's names. */
  readonly header: GgufHeader;
  /** How a parameter is stored in the file. Throws ArgumentError for a name that is not in `tensors`. */
  storedType(name: string): GgmlType;
  /** Why the sidecars lack a tokenizer, as a sentence; undefined where they have one. */
  readonly tokenizerNote: string | undefined;
  /** What of the file has no place in a Hugging Face checkpoint and should be known, as sentences. */
  readonly notes: readonly string[];
}

/** Types that pass through as they are; every other one is dequantized to F32. */
const PLAIN_TYPES: readonly GgmlType[] = ["F32", "F16", "BF16"] satisfies SourceTensor["dtype"][];

/**
 * Opens a GGUF file of the Llama family.
 *
 * Throws what `openGguf` throws; UnsupportedError for another architecture, a tensor without a place in the model, or a
 * tensor type that cannot be dequantized; FormatError for metadata or tensors that are missing or contradict each other.
 * A tokenizer of an unsupported kind is no error: see `tokenizerNote`.
 */
export async function openGgufModel(path: string): Promise<GgufModelSource> {
  const file = await openGguf(path);
  try {
    const model = readHyperparameters(file);
    const mapping = mapTensors(file, model);
    for (const { tensor } of mapping.tensors) checkDequantizable(tensor.type, tensor.name);
    const config = modelConfig(file, model, mapping);
    const parameters = new Map(mapping.tensors.map((mapped) => [mapped.name, mapped]));
    const sidecars = new Map([["generation_config.json", jsonFile(generationConfig(file))]]);
    const tokenizerNote = addTokenizer(file, sidecars);
    let closed = false;

    const parameter = (name: string, op: string): MappedTensor => {
      const mapped = parameters.get(name);
      if (!mapped) throw new ArgumentError(op, "name", `a tensor of ${path}`, `'${name}'`);
      return mapped;
    };
    const tensors = new Map([...parameters].map(([name, mapped]) => [name, describe(mapped)]));

    /** Elements [begin, end) of a tensor in the file's order, as bytes of the dtype it comes out as. */
    const readElements = async (
      { tensor }: MappedTensor,
      begin: number,
      end: number,
    ): Promise<Uint8Array<ArrayBuffer>> => {
      const { blockElements, blockBytes } = GGML_TYPES[tensor.type];
      const firstBlock = Math.floor(begin / blockElements);
      const blocks = Math.ceil(end / blockElements) - firstBlock;
      const stored = await file.read(tensor, firstBlock * blockBytes, blocks * blockBytes);
      if (PLAIN_TYPES.includes(tensor.type)) return stored;
      const values = dequantizeGguf(tensor.type, stored);
      const skipped = begin - firstBlock * blockElements;
      // Only a row of one element (a quantized vector) can begin inside a block.
      const wanted = blocks * blockElements === end - begin ? values : values.slice(skipped, skipped + end - begin);
      return new Uint8Array(wanted.buffer);
    };

    return {
      path,
      kind: "gguf",
      header: file,
      config,
      tensors,
      sidecars,
      tokenizerNote,
      notes: mapping.notes,
      storedBytes: (name) => parameter(name, "storedBytes").tensor.bytes,
      storedType: (name) => parameter(name, "storedType").tensor.type,
      async readRows(name, begin, end) {
        const mapped = parameter(name, "readRows");
        const source = describe(mapped);
        const { bytes } = rowRange(source, begin, end);
        if (closed) throw new DisposedError(path, "readRows");
        if (bytes === 0) return new Uint8Array(0);
        const rowElements = mapped.tensor.shape.slice(1).reduce((product, d) => product * d, 1);
        if (mapped.permutedHeads === undefined) return readElements(mapped, begin * rowElements, end * rowElements);

        const rows = permutedRows(rowCount(source.shape) / mapped.permutedHeads, begin, end);
        const span = await readElements(mapped, rows.first * rowElements, (rows.last + 1) * rowElements);
        return gatherRows(span, rows, rowBytes(source.dtype, source.shape));
      },
      close() {
        closed = true;
        return file.close();
      },
    };
  } catch (error) {
    await file.close();
    throw error;
  }
}

function describe({ name, tensor }: MappedTensor): SourceTensor {
  const dtype = PLAIN_TYPES.includes(tensor.type) ? (tensor.type as SourceTensor["dtype"]) : "F32";
  return { name, dtype, shape: tensor.shape };
}

/** Adds the tokenizer's files to the sidecars, or returns why there are none. */
function addTokenizer(file: GgufHeader, sidecars: Map<string, () => Promise<Uint8Array>>): string | undefined {
  try {
    for (const [name, text] of tokenizerFiles(readGgufTokenizer(file))) {
      sidecars.set(name, async () => new TextEncoder().encode(text()));
    }
    return undefined;
  } catch (error) {
    if (error instanceof UnsupportedError) return error.message;
    throw error;
  }
}

function jsonFile(value: unknown): () => Promise<Uint8Array> {
  return async () => new TextEncoder().encode(`${JSON.stringify(value, null, 2)}\n`);
}

/** The rows of the file that the wanted rows come from: `rows[i]`, relative to `first`, is row begin + i. */
interface PermutedRows {
  readonly first: number;
  readonly last: number;
  readonly rows: Uint32Array;
}

/**
 * Where rows [begin, end) of a q or k projection lie in the file. transformers rotates dimension i of a head together
 * with i + headDim/2; llama.cpp stores such pairs as neighbours: row j * headDim/2 + i of a head is row 2i + j there.
 */
function permutedRows(headDim: number, begin: number, end: number): PermutedRows {
  const half = headDim / 2;
  const rows = new Uint32Array(end - begin);
  let first = Number.POSITIVE_INFINITY;
  let last = 0;
  for (let row = begin; row < end; row++) {
    const within = row % headDim;
    const source = row - within + (within < half ? 2 * within : 2 * (within - half) + 1);
    rows[row - begin] = source;
    first = Math.min(first, source);
    last = Math.max(last, source);
  }
  for (let i = 0; i < rows.length; i++) rows[i] = rows[i]! - first;
  return { first, last, rows };
}

function gatherRows(span: Uint8Array, { rows }: PermutedRows, bytesPerRow: number): Uint8Array<ArrayBuffer> {
  const out = new Uint8Array(rows.length * bytesPerRow);
  for (let i = 0; i < rows.length; i++) {
    const from = rows[i]! * bytesPerRow;
    out.set(span.subarray(from, from + bytesPerRow), i * bytesPerRow);
  }
  return out;
}
