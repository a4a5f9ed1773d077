/**
 * State dicts on disk: one safetensors file with tensors `state.<number>.<name>`, and in its metadata `optimizer`, `param_groups`
 * (JSON, with the names of a torch group) and `step` (JSON: steps by number of the parameter). A bitsandbytes state dict written in that
 * way is read as well; `halfbyte` in the metadata tells the two apart, and `integrity` has the hash of everything.
 */
import { createHash, type Hash } from "node:crypto";
import type { DType } from "../core/dtype.js";
import { ArgumentError, FormatError } from "../core/errors.js";
import { OPTIMIZER_BLOCK } from "../core/optimizers.js";
import { type Shape, sizeOf } from "../core/shape.js";
import type { Tensor } from "../core/tensor.js";
import { bytesOf } from "../core/typedarray.js";
import { SafetensorsFile } from "../formats/safetensors.js";
import { SafetensorsWriter, type TensorDeclaration } from "../formats/safetensors-writer.js";
import type { SafetensorsDType } from "../formats/source.js";
import { CODEBOOK_SIZE } from "../quant/codebook.js";
import { copyHyper, type Group } from "./groups.js";
import type { Slot } from "./lists.js";
import { betasOf, type Hyper, show } from "./options.js";
import type { Rule } from "./rules.js";
import { allocateParts, disposeTensors, type ParameterState, STATE_KEYS } from "./state.js";
import {
  type Checked,
  type CheckedState,
  checkIncoming,
  type Described,
  ENTRY_KEYS,
  type Fail,
  isMap,
  mapKeys,
  mapOf,
  savedGroups,
  type Target,
} from "./state-dict.js";

const FORMAT = "optimizer";
const VERSION = "1";
const INTEGRITY = "integrity";
const HASH_BYTES = 32;
/** Bytes on their way between device and file at a time. */
const STEP_BYTES = 2 ** 26;

const FILE_DTYPE: Partial<Record<DType, SafetensorsDType>> = { f32: "F32", u8: "U8" };
const DTYPE_OF: Partial<Record<SafetensorsDType, DType>> = { F32: "f32", U8: "u8" };

/** A group under torch's names: SGD's momentum and RMSprop's alpha are in `betas` there. */
function toTorch(rule: Rule, group: ReturnType<typeof savedGroups>[number]): Record<string, unknown> {
  const { lr, eps = 0, weightDecay, alpha, tAlpha, tBeta3, params, names } = group;
  return {
    lr,
    betas: betasOf(rule, group),
    eps,
    weight_decay: weightDecay,
    ...(rule.family === "ademamix" && { alpha, t_alpha: tAlpha, t_beta3: tBeta3 }),
    optim_bits: group.optimBits,
    min_8bit_size: group.min8bitSize,
    max_unorm: group.maxUnorm,
    skip_zeros: group.skipZeros,
    params,
    ...(names && { param_names: names }),
  };
}

/** What a torch group says about the hyper-parameters of a rule; what it does not say (upstream keeps some elsewhere) is as in `own`. */
function fromTorch(rule: Rule, saved: Record<string, unknown>, own: Hyper): Hyper {
  const { betas } = saved;
  const [first] = Array.isArray(betas) ? betas : [];
  const named: Record<string, unknown> = {
    lr: saved.lr,
    betas,
    momentum: first,
    alpha: rule.betas === "alpha" ? first : saved.alpha,
    tAlpha: saved.t_alpha,
    tBeta3: saved.t_beta3,
    eps: saved.eps,
    weightDecay: saved.weight_decay,
  };
  const kept = {
    optimBits: saved.optim_bits ?? own.optimBits,
    min8bitSize: saved.min_8bit_size ?? own.min8bitSize,
    maxUnorm: saved.max_unorm ?? own.maxUnorm,
    skipZeros: saved.skip_zeros ?? own.skipZeros,
  };
  return copyHyper(rule, { ...named, ...kept } as Hyper);
}

/** What a file holds of one tensor: how its bytes are found, piece by piece. */
interface Item {
  readonly declaration: TensorDeclaration;
  readonly pieces: () => AsyncIterable<Uint8Array> | Iterable<Uint8Array>;
}

async function* piecesOf(tensor: Tensor): AsyncIterable<Uint8Array> {
  const { byteOffset, byteLength } = tensor;
  for (let at = 0; at < byteLength; at += STEP_BYTES) {
    // Throws where the optimizer was disposed meanwhile.
    const { storage } = tensor;
    yield await tensor.backend.read(storage, byteOffset + at, Math.min(STEP_BYTES, byteLength - at));
  }
}

function itemsOf(rule: Rule, slots: readonly Slot[]): Item[] {
  return slots.flatMap(({ index, state }) => {
    if (!state) return [];
    const tensors = STATE_KEYS.flatMap((key): Item[] => {
      const tensor = state.tensors[key];
      if (!tensor) return [];
      const dtype = FILE_DTYPE[tensor.dtype]!;
      return [
        { declaration: { name: `state.${index}.${key}`, dtype, shape: tensor.shape }, pieces: () => piecesOf(tensor) },
      ];
    });
    const maps = mapKeys(rule, state.bits).map((key): Item => {
      const declaration = { name: `state.${index}.${key}`, dtype: "F32", shape: [CODEBOOK_SIZE] } as const;
      return { declaration, pieces: () => [bytesOf(mapOf(key).values)] };
    });
    return [...tensors, ...maps];
  });
}

/** @throws ArgumentError, NonFiniteError, BackendError; nothing is left on disk then */
export async function saveFile(
  path: string,
  rule: Rule,
  groups: readonly Group[],
  slots: readonly Slot[],
): Promise<void> {
  if (typeof path !== "string" || path === "") throw new ArgumentError("save", "path", "a path", show(path));
  const metadata = {
    format: "pt",
    halfbyte: VERSION,
    optimizer: rule.name,
    param_groups: JSON.stringify(savedGroups(rule, groups, slots).map((group) => toTorch(rule, group))),
    step: JSON.stringify(Object.fromEntries(slots.flatMap(({ index, state }) => (state ? [[index, state.step]] : [])))),
  };
  const items = itemsOf(rule, slots);
  const hash = hashOf(metadata);
  const writer = new SafetensorsWriter(
    path,
    [...items.map(({ declaration }) => declaration), { name: INTEGRITY, dtype: "U8", shape: [HASH_BYTES] }],
    metadata,
  );
  try {
    for (const { declaration, pieces } of items) {
      hashTensor(hash, declaration.name, declaration.dtype, declaration.shape as Shape);
      for await (const piece of pieces()) {
        hash.update(piece);
        await writer.write(declaration.name, piece);
      }
    }
    await writer.write(INTEGRITY, hash.digest());
    await writer.commit();
  } finally {
    await writer.abort();
  }
}

function hashOf(metadata: Readonly<Record<string, string>>): Hash {
  const hash = createHash("sha256");
  for (const key of ["halfbyte", "optimizer", "param_groups", "step"]) hash.update(`${key}=${metadata[key]}\n`);
  return hash;
}

function hashTensor(hash: Hash, name: string, dtype: string, shape: Shape): void {
  hash.update(`${name} ${dtype} ${shape.join(",")}\n`);
}

/** Where a file has a tensor. */
interface Source {
  readonly name: string;
}

interface Loaded {
  readonly checked: Checked<Source>;
  readonly states: ReadonlyMap<Slot, ParameterState>;
}

/**
 * The new states that a file describes; what the optimizer has is not touched.
 * @throws FormatError, OutOfMemoryError, BackendError
 */
export async function loadFile(path: string, op: string, target: Target): Promise<Loaded> {
  if (typeof path !== "string" || path === "") throw new ArgumentError(op, "path", "a path", show(path));
  const file = await SafetensorsFile.open(path);
  try {
    const checked = await checkFile(path, op, target, file);
    return { checked, states: await readStates(path, target, file, checked) };
  } finally {
    await file.close();
  }
}

async function checkFile(path: string, op: string, target: Target, file: SafetensorsFile): Promise<Checked<Source>> {
  const fail: Fail = (_kind, where, expected, received) => {
    throw new FormatError(FORMAT, path, `${where}: expected ${expected}, received ${received}`);
  };
  const { rule, groups } = target;
  const { metadata } = file;
  const version = metadata.get("halfbyte");
  if (version !== undefined && version !== VERSION) fail("value", "metadata halfbyte", VERSION, show(version));
  const optimizer = metadata.get("optimizer");
  if (optimizer !== rule.name && (optimizer !== undefined || version !== undefined)) {
    fail("value", "optimizer", rule.name, show(optimizer));
  }
  const steps = parse(fail, metadata, "step", {});
  const entries = new Map<number, Map<string, Described<Source>>>();
  for (const { name, dtype, shape } of file.tensors.values()) {
    const [, digits, key] = /^state\.(0|[1-9][0-9]{0,14})\.([a-z_0-9]+)$/.exec(name) ?? [];
    if (digits === undefined) {
      if (name !== INTEGRITY || version === undefined)
        fail("value", name, "no tensor but state.<number>.<name>", "one");
      continue;
    }
    const id = Number(digits);
    const own = entries.get(id) ?? new Map<string, Described<Source>>();
    entries.set(id, own);
    // What upstream keeps beside the states for itself.
    if (version === undefined && key === "unorm_vec") continue;
    own.set(key!, { dtype: DTYPE_OF[dtype] ?? dtype, shape, source: { name } });
  }
  for (const id of Object.keys(steps)) {
    if (!entries.has(Number(id)))
      fail("value", `state.${id}`, "the states of a parameter that has made a step", "none");
  }
  const saved =
    version === undefined && !metadata.has("param_groups") ? undefined : parse(fail, metadata, "param_groups", []);
  if (saved !== undefined && !Array.isArray(saved)) fail("value", "param_groups", "a list", show(saved));
  const incoming = saved
    ? (saved as unknown[]).map((entry, i) => groupFrom(fail, rule, entry, i, groups))
    : savedGroups(rule, groups, target.slots).map(({ params, ...hyper }) => ({
        hyper: copyHyper(rule, hyper),
        params,
      }));
  const state = new Map<number, { step: unknown; entries: Map<string, Described<Source>> }>();
  for (const [id, own] of entries) {
    const step = own.get("step");
    own.delete("step");
    const counted = (steps as Record<string, unknown>)[id];
    state.set(id, { step: counted ?? (step && (await stepOf(file, step.source.name))), entries: own });
  }
  try {
    return checkIncoming(op, target, { groups: incoming, state }, fail);
  } catch (error) {
    // A hyper-parameter that no group may have.
    if (!(error instanceof ArgumentError)) throw error;
    return fail("value", error.operand, error.expected, error.received);
  }
}

function groupFrom(fail: Fail, rule: Rule, entry: unknown, i: number, groups: readonly Group[]) {
  const where = `param_groups[${i}]`;
  if (typeof entry !== "object" || entry === null) fail("value", where, "an object", show(entry));
  const saved = entry as Record<string, unknown>;
  const { params, param_names: names } = saved;
  if (!Array.isArray(params)) fail("value", `${where}.params`, "a list of numbers", show(params));
  if (names !== undefined && !Array.isArray(names)) fail("value", `${where}.param_names`, "a list", show(names));
  const own = groups[i]?.entry ?? groups[0]!.entry;
  return {
    hyper: fromTorch(rule, saved, own),
    params: params as number[],
    ...(names !== undefined && { names: names as string[] }),
  };
}

function parse(fail: Fail, metadata: ReadonlyMap<string, string>, key: string, missing: object): object {
  const text = metadata.get(key);
  if (text === undefined) return metadata.has("halfbyte") ? fail("value", `metadata ${key}`, "JSON", "none") : missing;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return fail("value", `metadata ${key}`, "JSON", show(text));
  }
  return typeof value === "object" && value !== null ? value : fail("value", `metadata ${key}`, "JSON", show(text));
}

/** A step that is a tensor: one number, as converters write it. */
async function stepOf(file: SafetensorsFile, name: string): Promise<number | undefined> {
  const { dtype, shape } = file.entry(name);
  if (sizeOf(shape) !== 1) return undefined;
  const view = new DataView((await file.read(name)).buffer);
  if (dtype === "I64") return Number(view.getBigInt64(0, true));
  if (dtype === "I32") return view.getInt32(0, true);
  return dtype === "F32" ? view.getFloat32(0, true) : undefined;
}

async function readStates(
  path: string,
  target: Target,
  file: SafetensorsFile,
  checked: Checked<Source>,
): Promise<Map<Slot, ParameterState>> {
  const states = new Map<Slot, ParameterState>();
  const own = file.metadata.has("halfbyte");
  try {
    const hash = hashOf(Object.fromEntries(file.metadata));
    for (const state of [...checked.states].sort((a, b) => a.id - b.id)) {
      const { slot, step, bits, parts } = state;
      const tensors = allocateParts(slot.p.backend, parts);
      states.set(slot, { step, bits, tensors });
      for (const { key, name } of inOrder(state)) {
        const entry = file.entry(name);
        hashTensor(hash, name, entry.dtype, entry.shape);
        if (key === "qmap1" || key === "qmap2") {
          const bytes = await file.read(name);
          hash.update(bytes);
          if (!isMap(key, bytes)) {
            throw new FormatError(FORMAT, path, `${name}: expected the values of the dynamic map, received others`);
          }
        } else if (!own && target.rule.family === "ademamix" && key === "absmax1") {
          const ambiguous = (): never => {
            throw new FormatError(
              FORMAT,
              path,
              `${name}: expected scales of a moment that is not zero, to tell its layout by`,
            );
          };
          upload(tensors.absmax1!, 0, upstreamScales(await file.read(name), slot.p.size, ambiguous));
        } else {
          await readInto(tensors[key]!, file, name, hash);
        }
      }
    }
    if (own) await checkHash(path, file, hash);
    return states;
  } catch (error) {
    for (const { tensors } of states.values()) disposeTensors(tensors);
    throw error;
  }
}

/** In the order in which they were hashed. */
function inOrder({ parts, maps }: CheckedState<Source>) {
  const names = new Map<string, string>([...parts, ...maps].map(({ key, source }) => [key, source.name]));
  return ENTRY_KEYS.flatMap((key) => (names.has(key) ? [{ key, name: names.get(key)! }] : []));
}

async function readInto(tensor: Tensor, file: SafetensorsFile, name: string, hash: Hash): Promise<void> {
  const buffer = new Uint8Array(Math.min(STEP_BYTES, tensor.byteLength));
  for (let at = 0; at < tensor.byteLength; at += STEP_BYTES) {
    const piece = buffer.subarray(0, Math.min(STEP_BYTES, tensor.byteLength - at));
    await file.readRange(name, at, piece);
    hash.update(piece);
    upload(tensor, at, piece);
  }
}

function upload(tensor: Tensor, at: number, bytes: Uint8Array): void {
  tensor.backend.write(tensor.storage, tensor.byteOffset + at, bytes);
}

async function checkHash(path: string, file: SafetensorsFile, hash: Hash): Promise<void> {
  const entry = file.tensors.get(INTEGRITY);
  const expected = entry && entry.end - entry.begin === HASH_BYTES ? await file.read(INTEGRITY) : undefined;
  if (!expected || Buffer.compare(expected, hash.digest()) !== 0) {
    throw new FormatError(FORMAT, path, "was changed after it was written: its hash is another");
  }
}

/**
 * AdEMAMix's two rows of scales, wherever upstream has put them. Its CUDA kernel writes those of the slow moment from floor(n / 256) on, so
 * that with a last block that is not full they share a place with the last one of the fast moment (both get that one here, as upstream
 * decodes them) and the last place stays 0; its other backends fill two rows. A moment of zeros could be either.
 */
function upstreamScales(bytes: Uint8Array<ArrayBuffer>, n: number, fail: () => never): Uint8Array {
  const scales = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4).slice();
  const blocks = scales.length / 2;
  const slow = scales.subarray(blocks);
  if (n % OPTIMIZER_BLOCK === 0 || slow[blocks - 1] !== 0) return bytes;
  if (scales[blocks - 1] === 0 && slow.some((scale) => scale !== 0)) return fail();
  slow.set(scales.slice(blocks - 1, -1));
  return bytesOf(scales);
}
