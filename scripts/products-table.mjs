// Writes the table of paths into docs/products.md from the code that chooses them (src/core/product-paths.ts); with --check only
// says whether it is up to date.
import { readFileSync, renameSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { FLOAT_DTYPES } from "../dist/core/dtype.js";
import { DENSE_SLICE_BYTES, LEAST_TILE_ELEMENTS, productPath } from "../dist/core/product-paths.js";

export const DOCS = fileURLToPath(new URL("../docs/products.md", import.meta.url));
const BEGIN = "<!-- table: paths -->\n";
const END = "<!-- end -->";
/** Beyond these many rows nothing changes: the code is asked for each up to here, and for some beyond. */
const MOST_ROWS = 8192;
const BEYOND = [1e5, 1e6, 1e7];
const MODES = ["exact", "fast"];

const usual = { n: 4096, k: 4096, blocksize: 64, aligned: true };
/** Kinds of weights, and some of each kind, its limits among them: the code must treat them alike. */
const millions = `${LEAST_TILE_ELEMENTS / 2 ** 20} Mi elements`;
export const WEIGHTS = [
  {
    name: `K a multiple of 64, blocks of 64 and more, ${millions} and more`,
    shapes: [
      usual,
      { ...usual, n: LEAST_TILE_ELEMENTS / 64, k: 64 },
      { ...usual, n: 32, k: LEAST_TILE_ELEMENTS / 32 },
      { ...usual, n: 14592, k: 576, blocksize: 4096 },
      { ...usual, n: 49152, k: 28672 },
    ],
  },
  {
    name: `K a multiple of 64, blocks of 64 and more, less than ${millions}`,
    shapes: [
      { ...usual, n: 32, k: 64 },
      { ...usual, n: LEAST_TILE_ELEMENTS / 64 - 1, k: 64 },
      { ...usual, n: 1536, k: 576, blocksize: 4096 },
    ],
  },
  {
    name: `K another multiple of 32, or blocks of 32, ${millions} and more`,
    shapes: [
      { ...usual, n: LEAST_TILE_ELEMENTS / 32, k: 32 },
      { ...usual, k: 4128 },
      { ...usual, blocksize: 32 },
      { ...usual, n: 100_000, k: 96, blocksize: 4096 },
    ],
  },
  {
    name: `K another multiple of 32, or blocks of 32, less than ${millions}`,
    shapes: [
      { ...usual, k: 32 },
      { ...usual, n: 32, k: 96, blocksize: 4096 },
      { ...usual, n: 576, k: 576, blocksize: 32 },
    ],
  },
  {
    name: "another K, less than 32 rows, or operands that do not begin at multiples of 16 bytes",
    shapes: [
      { ...usual, k: 4095 },
      { ...usual, k: 4112 },
      { ...usual, n: 31 },
      { ...usual, n: 1 },
      { ...usual, aligned: false },
      { ...usual, blocksize: 32, aligned: false },
    ],
  },
];

/** What runs on a path. A path without an entry fails. */
const RUNS = {
  exact: "`matmul4bit`: decodes in registers, float32 sums; nested scales by a launch before",
  fast: "`quantizeActivations`, then `matmul4bitFast`: integer products; nested scales by a launch before",
  vector: "`matmul4bit`: tensor cores on codes, their sums times the scales; nested scales in the kernel",
  tiles:
    "`matmul4bit`: tensor cores on weights decoded on their way into registers, in parts of K for small weights, which `sumPartials` " +
    "adds up; nested scales by a launch before",
  plain: "`matmul4bit`: float32 arithmetic; nested scales in the kernel",
  dense: `\`dequantize4bit\` into scratch memory, at most ${DENSE_SLICE_BYTES / 2 ** 20} MiB at a time, then \`matmul\`; nested scales by a launch before`,
};

/** Ranges of rows with one path: [first, last, path], last Infinity in the end. */
function ranges(device, shape, mode) {
  const found = [];
  for (const m of [...Array.from({ length: MOST_ROWS }, (_, i) => i + 1), ...BEYOND]) {
    const path = productPath(device, { ...shape, m }, mode);
    const last = found.at(-1);
    if (last?.[2] === path) last[1] = m;
    else found.push([m, m, path]);
  }
  if (found.at(-1)[0] > MOST_ROWS) throw new Error(`a path changes beyond ${MOST_ROWS} rows: ask in more places`);
  found.at(-1)[1] = Number.POSITIVE_INFINITY;
  return JSON.stringify(found);
}

/** The ranges of a kind of weight, as JSON. */
function rangesOf(device, { name, shapes }, dtype, mode) {
  const [first, ...others] = shapes.map((shape) => ranges(device, { ...shape, dtype }, mode));
  if (others.some((other) => other !== first))
    throw new Error(`scripts/products-table.mjs: not alike on ${device}: ${name}`);
  return first;
}

/** Groups for which all is alike share rows: first weights, then dtypes, then modes. */
function groups(device) {
  const join = (entries) => {
    const found = new Map();
    for (const [value, key] of entries) found.set(key, [...(found.get(key) ?? []), value]);
    return [...found].map(([key, values]) => [values, key]);
  };
  const byWeight = (dtype, mode) => join(WEIGHTS.map((weight) => [weight.name, rangesOf(device, weight, dtype, mode)]));
  const byDType = (mode) => join(FLOAT_DTYPES.map((dtype) => [dtype, JSON.stringify(byWeight(dtype, mode))]));
  return join(MODES.map((mode) => [mode, JSON.stringify(byDType(mode))])).flatMap(([modes, dtypesOf]) =>
    JSON.parse(dtypesOf).flatMap(([dtypes, weightsOf]) =>
      JSON.parse(weightsOf).map(([weights, found]) => ({ modes, dtypes, weights, found: JSON.parse(found) })),
    ),
  );
}

/** The two tables as markdown, a blank line between them. */
export function pathTable() {
  const lines = ["cpu", "cuda"].flatMap((device) =>
    groups(device).flatMap(({ modes, dtypes, weights, found }) =>
      found.map(([first, last, path]) => {
        const which = weights.length === WEIGHTS.length ? "any" : weights.join("; ");
        return [device, modes.join(", "), dtypes.join(" "), which, range(first, last), path];
      }),
    ),
  );
  const head = ["device", "mode", "dtypes", "weight", "rows of A", "path"];
  const table = [head, head.map(() => "---"), ...lines].map((cells) => `| ${cells.join(" | ")} |`);
  const paths = [...new Set(lines.map((line) => line.at(-1)))].map((path) => {
    if (!(path in RUNS)) throw new Error(`scripts/products-table.mjs does not say what the path ${path} is`);
    return `| \`${path}\` | ${RUNS[path]} |`;
  });
  return [...table, "", "| path | what runs |", "| --- | --- |", ...paths].join("\n");
}

// JSON has no infinity: what has no last row is null there.
function range(first, last) {
  if (last === null) return first === 1 ? "any" : `${first} and more`;
  return first === last ? String(first) : `${first} to ${last}`;
}

/** A text with the table between its marks. @throws when there are none */
export function withTable(text) {
  const from = text.indexOf(BEGIN) + BEGIN.length;
  const to = text.indexOf(END, from);
  if (from < BEGIN.length || to < 0) throw new Error(`docs/products.md has no ${BEGIN.trim()} ... ${END}`);
  return `${text.slice(0, from)}${pathTable()}\n${text.slice(to)}`;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const text = readFileSync(DOCS, "utf8");
  const written = withTable(text);
  if (!process.argv.includes("--check")) {
    writeFileSync(`${DOCS}.new`, written);
    renameSync(`${DOCS}.new`, DOCS);
  } else if (text !== written) {
    console.error("docs/products.md is out of date: npm run support");
    process.exitCode = 1;
  }
}
