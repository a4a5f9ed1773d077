// What the kernels cost on an Orin in instructions, counted in their sm_87 code: a table for docs/benchmarks.md.
//
//   node bench/sass.mjs [FOLDER] [--arch 87] [--entry NAME] [--dump NAME] [--cuobjdump PROGRAM] [--json]
//     FOLDER   images and their manifest; default: HALFBYTE_KERNELS, else dist/backend/cuda/kernels
//     --dump   prints the instructions that were counted for an entry
//
// Counted is what one thread executes for its vectors of 16 bytes: the way through the code that moves the most bytes in words
// of eight and more, and of several such ways the shortest; for a kernel whose blocks walk over the work, one round of that loop. The
// way is found in the graph of branches, not by running anything: parts that only some block sizes need may be missing, and a loop
// inside counts once (the last column says so). A count per element is that of a thread, divided by its elements.
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    arch: { type: "string", default: "87" },
    entry: { type: "string", default: "" },
    dump: { type: "string" },
    cuobjdump: { type: "string", default: process.env.HALFBYTE_CUOBJDUMP ?? "cuobjdump" },
    json: { type: "boolean", default: false },
  },
});
const root = resolve(import.meta.dirname, "..");
const folder = positionals[0] ?? process.env.HALFBYTE_KERNELS ?? join(root, "dist/backend/cuda/kernels");

/**
 * Thread instructions that one multiprocessor of sm_87 starts per clock (CUDA C++ Programming Guide, Arithmetic Instructions): of
 * all kinds, on integers, and of shared memory and shuffles, which conflicts of banks would slow down further.
 */
const ISSUE = 128;
const INTEGER_ISSUE = 64;
const SHARED_ISSUE = 32;
/** Multiprocessors, GHz and GB/s (docs/jetson.md has where from). */
const BOARDS = {
  "AGX Orin": { multiprocessors: 16, ghz: 1.3, gbytes: 204.8 },
  "Orin Nano Super": { multiprocessors: 8, ghz: 1.02, gbytes: 102 },
};

const FLOATS = { f32: 4, f16: 2, bf16: 2 };
/** Bytes of codes and scales of an element, at the block sizes of the benches. */
const CODES = [
  [/4bit/, 1 / 2 + 4 / 64],
  [/lockwise/, 1 + 4 / 256],
  [/int8/, 1],
];

/** Which accesses say how many elements a thread has, by how many bytes each; and what an element moves in all. */
function sideOf(entry) {
  const dtype = Object.keys(FLOATS).find((name) => entry.split("_").includes(name));
  if (!dtype) return undefined;
  const passes = entry.startsWith("int8VectorwiseQuant") ? 2 : 1;
  const store = /^dequantize|Dequant/.test(entry);
  const moved = FLOATS[dtype] + CODES.find(([pattern]) => pattern.test(entry))[1];
  return { names: store ? STORES : LOADS, bytes: FLOATS[dtype] * passes, moved };
}

// What the compiler cannot prove to be global memory is accessed without the G.
const LOADS = new Set(["LDG", "LD"]);
const STORES = new Set(["STG", "ST"]);

const CLASSES = {
  global: /^(LDG|STG|LD|ST|LDGSTS|ATOM|ATOMG|RED|LDL|STL)$/,
  shared: /^(LDS|STS|ATOMS|LDSM)$/,
  shuffle: /^(SHFL|VOTE|REDUX|MATCH)$/,
  convert: /^(F2F|F2I|I2F|F2FP|I2FP|I2I|FRND|F2IP|I2IP)$/,
  special: /^(MUFU|FCHK|D[A-Z]+)$/,
  float: /^(FADD|FMUL|FFMA|FMNMX|FSETP|FSET|FSEL|FADD32I|FMUL32I|FFMA32I|H[A-Z]+2.*|HMNMX2)$/,
  uniform: /^(U[A-Z0-9]+|R2UR|S2UR|LDC|ULDC)$/,
  control:
    /^(BRA|BRX|EXIT|BSSY|BSYNC|BREAK|BAR|WARPSYNC|CALL|RET|NOP|YIELD|BMOV|NANOSLEEP|DEPBAR|ERRBAR|MEMBAR|CCTL|JMP|S2R|CS2R|B2R|R2B|PLOP3|P2R|R2P|VOTEU)$/,
};
const KINDS = [...Object.keys(CLASSES), "integer"];
function classOf(name) {
  for (const [kind, pattern] of Object.entries(CLASSES)) if (pattern.test(name)) return kind;
  return "integer";
}

/** The functions of a listing: name and instructions { at, conditional, name, text, target, bytes, wide }. */
function parse(listing) {
  const functions = new Map();
  let own;
  // A quantizer stores codes and scales in words of four bytes, too; what else stores four bytes is a decoder's slow way.
  let leastStore = 0;
  for (const line of listing.split("\n")) {
    const title = /^\s*Function : (\S+)/.exec(line);
    if (title) {
      own = [];
      leastStore = /^dequantize|Dequant/.test(title[1]) ? 8 : 4;
      functions.set(title[1], own);
      continue;
    }
    const found = /^\s*\/\*([0-9a-f]{4,})\*\/\s+(@!?U?P[0-9T]\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Z0-9_:]+)*)([^;]*);/.exec(
      line,
    );
    if (!found || !own) continue;
    const [, at, predicate, name, suffix, operands] = found;
    const jumps = name === "BRA" || name === "JMP" || name === "CALL";
    const target = jumps ? /0x([0-9a-f]+)\s*$/.exec(operands.trim())?.[1] : undefined;
    const width = Number(/\.(?:U|S)?(128|64|32|16|8)\b/.exec(suffix)?.[1] ?? 32) / 8;
    const moves = LOADS.has(name) || STORES.has(name);
    own.push({
      at: Number.parseInt(at, 16),
      conditional: predicate !== undefined || /\.(DIV|CONV)/.test(suffix),
      name,
      text: line.slice(line.indexOf("*/") + 2, line.indexOf(";")).trim(),
      target: target === undefined ? undefined : Number.parseInt(target, 16),
      // Loads of eight bytes are operands.
      wide: width === 16 || (width >= leastStore && STORES.has(name)) ? (moves ? width : 0) : 0,
      vector: moves && width === 16 ? width : 0,
    });
  }
  return functions;
}

/** What a block ends with. Where an indirect jump (BRX) goes is not followed. */
const ENDS = new Set(["EXIT", "RET", "BRX"]);

/** Basic blocks in the order of addresses, with the indices of those that may follow. */
function blocksOf(code) {
  const starts = new Set([code[0].at]);
  for (const [i, { target, name }] of code.entries()) {
    if (target !== undefined) starts.add(target);
    if (((target !== undefined && name !== "CALL") || ENDS.has(name)) && code[i + 1]) starts.add(code[i + 1].at);
  }
  const blocks = [];
  for (const instruction of code) {
    if (starts.has(instruction.at)) blocks.push({ at: instruction.at, code: [], next: [] });
    blocks.at(-1).code.push(instruction);
  }
  const byStart = new Map(blocks.map((block, i) => [block.at, i]));
  for (const [i, block] of blocks.entries()) {
    const last = block.code.at(-1);
    const jumps = last.target !== undefined && last.name !== "CALL";
    const leaves = jumps || ENDS.has(last.name);
    block.exit = last.name === "EXIT" || last.name === "RET";
    if (jumps && byStart.has(last.target)) block.next.push(byStart.get(last.target));
    if ((!leaves || last.conditional) && i + 1 < blocks.length) block.next.push(i + 1);
  }
  return blocks;
}

/** The instructions of a block, with those of the functions that it surely calls. */
function executed(blocks, block) {
  block.executed ??= block.code.flatMap((instruction) => {
    if (instruction.name !== "CALL" || instruction.conditional) return [instruction];
    const callee = blocks.findIndex(({ at }) => at === instruction.target);
    const way = callee < 0 || blocks[callee].under ? undefined : shortestWay(blocks, callee);
    return way ? [instruction, ...way] : [instruction];
  });
  return block.executed;
}

/** The shortest way through a function that is called. */
function shortestWay(blocks, from) {
  blocks[from].under = true;
  try {
    const found = bestWay(blocks, from, undefined);
    return found?.way.flatMap((i) => executed(blocks, blocks[i]));
  } finally {
    blocks[from].under = false;
  }
}

/** The way from block `from` to `to` (or to any exit) that moves most, and then is shortest. */
function bestWay(blocks, from, to) {
  const best = new Array(blocks.length);
  const own = blocks.map((block) => {
    const code = executed(blocks, block);
    // What a callee moves is the slow way's.
    return { wide: block.code.reduce((sum, { wide }) => sum + wide, 0), count: code.length };
  });
  best[from] = { wide: own[from].wide, count: own[from].count, before: -1 };
  for (let i = from; i < blocks.length; i++) {
    if (!best[i]) continue;
    for (const next of blocks[i].next) {
      if (next <= i || (to !== undefined && next > to)) continue;
      const wide = best[i].wide + own[next].wide;
      const count = best[i].count + own[next].count;
      const other = best[next];
      if (!other || wide > other.wide || (wide === other.wide && count < other.count))
        best[next] = { wide, count, before: i };
    }
  }
  const ends =
    to === undefined ? blocks.map((_, i) => i).filter((i) => blocks[i].exit && best[i]) : best[to] ? [to] : [];
  ends.sort((a, b) => best[b].wide - best[a].wide || best[a].count - best[b].count);
  if (ends.length === 0) return undefined;
  const way = [];
  for (let i = ends[0]; i >= 0; i = best[i].before) way.unshift(i);
  return { way, ...best[ends[0]] };
}

/** What a thread executes for its vectors. */
function hotWay(code) {
  const blocks = blocksOf(code);
  const loops = blocks.flatMap(({ next }, i) => next.filter((n) => n <= i && n !== i).map((n) => ({ from: n, to: i })));
  // A block that jumps to itself is a loop too, but the padding behind a function's end does so as well.
  for (const [i, { next, code: own }] of blocks.entries())
    if (next.includes(i) && own.length > 1) loops.push({ from: i, to: i });
  const ways = [{ ...bestWay(blocks, 0, undefined), loop: undefined }];
  for (const loop of loops) ways.push({ ...bestWay(blocks, loop.from, loop.to), loop });
  const found = ways.filter(({ wide }) => wide > 0).sort((a, b) => b.wide - a.wide || a.count - b.count);
  const [chosen] = found;
  if (!chosen) return undefined;
  const inside = loops.filter(
    ({ from, to }) =>
      chosen.way.includes(from) && chosen.way.includes(to) && !(from === chosen.loop?.from && to === chosen.loop?.to),
  );
  return {
    instructions: chosen.way.flatMap((i) => executed(blocks, blocks[i])),
    round: chosen.loop !== undefined,
    inside: inside.length,
  };
}

function count(entry, code) {
  const side = sideOf(entry);
  const way = side && hotWay(code);
  if (!way) return undefined;
  const { instructions, round, inside } = way;
  const sum = (list, field) => list.reduce((total, item) => total + item[field], 0);
  const elements =
    sum(
      instructions.filter(({ name }) => side.names.has(name)),
      "vector",
    ) / side.bytes;
  if (elements === 0) return undefined;
  const kinds = Object.fromEntries(KINDS.map((kind) => [kind, 0]));
  for (const { name } of instructions) kinds[classOf(name)]++;
  const bytes = side.moved;
  const each = instructions.length / elements;
  const boards = Object.fromEntries(
    Object.entries(BOARDS).map(([board, { multiprocessors, ghz, gbytes }]) => {
      const memory = bytes / gbytes;
      const clocks = Math.max(
        instructions.length / ISSUE,
        kinds.integer / INTEGER_ISSUE,
        (kinds.shared + kinds.shuffle) / SHARED_ISSUE,
      );
      return [board, clocks / elements / (multiprocessors * ghz) / memory];
    }),
  );
  return { entry, elements, instructions: each, bytes, kinds, round, inside, boards, listing: instructions };
}

const manifest = JSON.parse(readFileSync(join(folder, "manifest.json"), "utf8"));
const images = manifest.images.filter(
  ({ kind, architecture }) => kind === "cubin" && String(architecture) === options.arch,
);
if (images.length === 0) throw new Error(`${folder} has no cubin for sm_${options.arch}`);
const rows = [];
const skipped = [];
for (const { file } of images) {
  const listing = execFileSync(options.cuobjdump, ["-sass", join(folder, file)], {
    encoding: "utf8",
    maxBuffer: 1 << 30,
  });
  for (const [entry, code] of parse(listing)) {
    if (!entry.includes(options.entry)) continue;
    const found = count(entry, code);
    if (found) rows.push(found);
    else skipped.push(entry);
  }
}
rows.sort((a, b) => (a.entry < b.entry ? -1 : 1));

if (options.dump !== undefined) {
  const found = rows.find(({ entry }) => entry === options.dump);
  if (!found)
    throw new Error(`nothing was counted for ${options.dump}; there are ${rows.map((r) => r.entry).join(", ")}`);
  for (const { at, text, name } of found.listing)
    console.log(`${at.toString(16).padStart(5)}  ${classOf(name).padEnd(8)} ${text}`);
} else if (options.json) {
  console.log(
    JSON.stringify(
      rows.map(({ listing: _, ...row }) => row),
      undefined,
      1,
    ),
  );
} else {
  console.log(
    `sm_${options.arch}, ${[...new Set(images.map(({ compiler }) => compiler))].join(", ")}; instructions of a thread per element\n`,
  );
  const head = [
    "entry",
    "elements",
    "bytes",
    "instructions",
    ...KINDS,
    "per byte",
    ...Object.keys(BOARDS).map((b) => `of ${b}'s memory time`),
    "counted",
  ];
  console.log(`| ${head.join(" | ")} |\n|${"---|".repeat(head.length)}`);
  for (const { entry, elements, instructions, bytes, kinds, round, inside, boards } of rows) {
    const cells = [entry, elements, bytes.toFixed(2), instructions.toFixed(1)];
    for (const kind of KINDS) cells.push((kinds[kind] / elements).toFixed(2));
    cells.push(
      (instructions / bytes).toFixed(1),
      ...Object.values(boards).map((share) => `${(100 * share).toFixed(0)} %`),
    );
    cells.push((round ? "one round" : "a whole thread") + (inside > 0 ? `, ${inside} loops inside once` : ""));
    console.log(`| ${cells.join(" | ")} |`);
  }
  if (skipped.length > 0) console.log(`\nnot counted: ${skipped.join(", ")}`);
}
