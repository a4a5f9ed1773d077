// The markdown tables of docs/benchmarks.md about the GPU, about products and about optimizers, from what benches have measured and from the sm_87 code.
//
//   npm run bench -- --device cuda --peer --json build/bench.json
//   npm run bench -- --what products,optimizers --peer --json build/bench-cpu.json
//   node bench/sass.mjs --json > build/sass.json
//   node scripts/bench-table.mjs build/bench.json build/sass.json ...            prints them
//   node scripts/bench-table.mjs build/bench.json build/sass.json ... --write    puts them between their marks in docs/benchmarks.md
//
// A section `name` lies between `<!-- table: name -->` and `<!-- end -->`. What the file of a section is not given for stays as it is.
import { readFileSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";

const DOCS = join(import.meta.dirname, "../docs/benchmarks.md");
/** Elements of the two sizes that are measured. */
const LARGE = 134_217_728;
const SMALL = 1_048_576;

/** What the kernels are to reach, as shares of the copy speed at LARGE elements; `bench` is a result's name. */
const SHARES = [
  ["quantize NF4 block 64 from bf16", "quantize nf4 block 64 bf16", 0.85],
  ["quantize NF4 block 64 from f32", "quantize nf4 block 64 f32", 0.85],
  ["dequantize NF4 block 64 to bf16", "dequantize nf4 block 64 bf16", 0.92],
  ["dequantize NF4 block 64 to f32", "dequantize nf4 block 64 f32", 0.92],
  ["quantize 8-bit dynamic block 256 from bf16", "quantize 8-bit dynamic block 256 bf16", 0.7],
  ["dequantize 8-bit dynamic block 256 to bf16", "dequantize 8-bit dynamic block 256 bf16", 0.92],
];
/** What a step on LARGE bf16 parameters is to take, in microseconds; a model's tensors, in times of one tensor of its size. */
const STEPS = [
  ["Adam, 8 bits", "Adam 8-bit bf16", 430],
  ["Adam, 32 bits", "Adam 32-bit bf16", 800],
  ["Lion, 8 bits", "Lion 8-bit bf16", 350],
  ["SGD, 8 bits", "SGD 8-bit bf16", 350],
  ["AdEMAMix, 8 bits", "AdEMAMix 8-bit bf16", 500],
];
const MODEL_RATIO = 1.3;
/** Microseconds for a launch from JavaScript, 1,000 in a row. */
const LAUNCH = 4;

/** Entries of the table of instructions: the kernels of the benches. That of int8 quantization is a mixture of two loops. */
const SASS =
  /^(quantize4bit_(bf16|f32)_(nf4|fp4)|dequantize4bit_(bf16|f32)_nf4|(de)?quantizeBlockwise_(bf16|f32)|int8VectorwiseDequant_bf16_block)$/;

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: { write: { type: "boolean", default: false } },
});
if (positionals.length === 0) throw new Error("usage: node scripts/bench-table.mjs FILE.json... [--write]");

const percent = (share) => `${(share * 100).toFixed(0)} %`;
const micro = (value) => `${value.toFixed(value < 10 ? 2 : 1)} µs`;
const grouped = (value) => value.toLocaleString("en-US");
const line = (cells) => `| ${cells.join(" | ")} |`;
const table = (head, rows) => [line(head), `|${"---|".repeat(head.length)}`, ...rows.map(line)].join("\n");

/** Sections of a result of `npm run bench -- --device cuda --json`. */
function benchSections({ machine, gpu, images, results, launches, products, peer, optimizers, peerOptimizers }) {
  const find = (name, elements) => results.find((r) => r.name === name && r.elements === elements);
  const theirs = (r) => (r.peer === undefined ? undefined : peer?.sizes[r.elements]?.ops[r.peer]);
  const driver = `${Math.floor(gpu.driverVersion / 1000)}.${(gpu.driverVersion % 1000) / 10}`;
  const made = [...new Set(images.map((image) => image.replace(/^\S+ /, "")))].join(", ");
  const where = [
    `${gpu.name} (${gpu.multiprocessors} multiprocessors), driver for CUDA ${driver}, ${machine.cpu}, Node ${machine.node}. Images: ${made}.`,
    ...(peer ? [`Beside: ${peer.versions}.`] : []),
  ].join("\n");
  // Of what the other tables are measured on, which a run of the optimizers alone does not renew.
  const sections = {
    cuda: results.length > 0 || products?.results.length > 0 ? where : undefined,
    "cuda-large": sizeTable(LARGE),
    "cuda-small": sizeTable(SMALL),
  };
  if (launches.length > 0) sections.launches = launchTable(launches);
  const goals = goalTable();
  if (goals) sections.goals = goals;
  const double = doubleTable();
  if (double) sections.double = double;
  if (products?.results.length > 0) Object.assign(sections, productSections(products, peer));
  if (optimizers?.length > 0) Object.assign(sections, optimizerSections(optimizers, peerOptimizers, where));
  return sections;

  function sizeTable(elements) {
    const own = results.filter((r) => r.elements === elements);
    if (own.length === 0) return undefined;
    const other = peer?.sizes[elements];
    const head = ["", "µs", "launched, µs", "Gelem/s", "of copy"];
    const rows = own.map((r) => {
      const cells = [
        r.name,
        r.microseconds.toFixed(1),
        r.launchedMicroseconds.toFixed(1),
        r.gelem.toFixed(0),
        percent(r.ofCopy),
      ];
      if (!other) return cells;
      const time = theirs(r);
      if (time === undefined) return [...cells, "-", "-", "-"];
      const ofTheirCopy = (r.gbytes * r.microseconds * 1e3) / time / ((8 * elements) / other.copy);
      return [...cells, time.toFixed(1), percent(ofTheirCopy), `${(time / r.microseconds).toFixed(2)}x`];
    });
    const speeds = `Copy: ${own[0].gbytes.toFixed(0)} GB/s${other ? `, torch's ${((8 * elements) / other.copy / 1e3).toFixed(0)} GB/s` : ""}.`;
    const wrong = own.filter((r) => r.wrong !== undefined).map((r) => `WRONG: ${r.name}: ${r.wrong}`);
    return [
      speeds,
      "",
      table(other ? [...head, "bitsandbytes, µs", "of its copy", "ours to theirs"] : head, rows),
      ...wrong,
    ].join("\n");
  }

  function goalTable() {
    const rows = SHARES.flatMap(([what, name, goal]) => {
      const r = find(name, LARGE);
      if (!r) return [];
      const time = theirs(r);
      const other = peer?.sizes[LARGE];
      const ofTheirCopy = time && (r.gbytes * r.microseconds * 1e3) / time / ((8 * LARGE) / other.copy);
      return [
        [what, percent(goal), reached(percent(r.ofCopy), r.ofCopy >= goal), ofTheirCopy ? percent(ofTheirCopy) : "-"],
      ];
    });
    const slowest = Math.max(...launches.filter(isLaunch).map(({ microseconds }) => microseconds));
    if (Number.isFinite(slowest)) {
      rows.push([
        "launch of a kernel, 1,000 in a row, host",
        `below ${LAUNCH} µs`,
        reached(micro(slowest), slowest < LAUNCH),
        "-",
      ]);
    }
    return rows.length > 0 ? table(["goal", "share of the copy speed", "reached", "bitsandbytes"], rows) : undefined;
  }

  function doubleTable() {
    const rows = [LARGE, SMALL].flatMap((elements) =>
      ["quantize", "dequantize"].flatMap((what) => {
        const plain = find(`${what} nf4 block 64 bf16`, elements);
        const nested = find(`${what} nf4 block 64 bf16, double`, elements);
        if (!plain || !nested) return [];
        const own = [plain.microseconds, nested.microseconds];
        const cells = [`${what}, ${grouped(elements)}`, ...added(own)];
        const other = [theirs(plain), theirs(nested)];
        return [[...cells, ...(other.includes(undefined) ? ["-", "-", "-"] : added(other))]];
      }),
    );
    if (rows.length === 0) return undefined;
    return table(
      ["NF4, bf16, block 64; elements", "µs", "double, µs", "added", "bitsandbytes, µs", "double, µs", "added"],
      rows,
    );
  }
}

/** Steps of the optimizers, by the classes. */
function optimizerSections(results, peer, where) {
  const times = (theirs, own) => (theirs ? `${(theirs / own).toFixed(2)}x` : "-");
  const shown = (time) => time?.toFixed(1) ?? "-";
  const rows = results.map((r) => {
    const theirs = peer?.ops[r.peer];
    const cells = [
      r.name,
      r.microseconds,
      r.launchedMicroseconds,
      (r.microseconds * r.ofCopy).toFixed(0),
      percent(r.ofCopy),
    ];
    return [
      ...cells.map((cell) => (typeof cell === "number" ? shown(cell) : cell)),
      shown(theirs),
      times(theirs, r.microseconds),
    ];
  });
  const head = ["", "µs", "launched, µs", "floor, µs", "of copy", "bitsandbytes, µs", "ours to theirs"];
  const wrong = results.filter((r) => r.wrong !== undefined).map((r) => `WRONG: ${r.name}: ${r.wrong}`);
  const speeds = `Copy: ${results[0].gbytes.toFixed(0)} GB/s.${peer ? ` Beside: ${peer.versions}.` : ""}`;

  const find = (name) => results.find((r) => r.name.startsWith(name));
  const goals = STEPS.flatMap(([what, name, goal]) => {
    const r = results.find((one) => one.name === name);
    const time = r && `${r.microseconds.toFixed(0)} µs`;
    return r ? [[what, `${goal} µs`, reached(time, r.microseconds <= goal), shown(peer?.ops[r.peer])]] : [];
  });
  for (const bits of [8, 32]) {
    const [one, many] = [find(`AdamW ${bits}-bit bf16, one tensor`), find(`AdamW ${bits}-bit bf16, 272 tensors`)];
    if (!one || !many) continue;
    const ratio = many.microseconds / one.microseconds;
    const [theirOne, theirMany] = [peer?.ops[one.peer], peer?.ops[many.peer]];
    const theirs = theirOne && theirMany ? `${(theirMany / theirOne).toFixed(2)}x` : "-";
    const what = `AdamW, ${bits} bits, SmolLM2's 272 tensors to one tensor`;
    goals.push([what, `${MODEL_RATIO}x`, reached(`${ratio.toFixed(2)}x`, ratio <= MODEL_RATIO), theirs]);
  }
  // What torch has of its own.
  const others = Object.entries(peer?.ops ?? {}).filter(
    ([name]) => name.startsWith("torch ") && !name.includes("_f32"),
  );
  return {
    "cuda-optimizers": [where, speeds, "", table(head, rows), ...wrong].join("\n"),
    "cuda-optimizer-goals":
      goals.length > 0 ? table(["goal", "at most", "reached", "bitsandbytes, µs"], goals) : undefined,
    "cuda-optimizers-torch":
      others.length > 0
        ? table(
            ["torch", "µs"],
            others.map(([name, time]) => [name.replaceAll("_", " "), shown(time)]),
          )
        : undefined,
  };
}

/** Products with the weights of large models, and with SmolLM2's. */
function productSections({ copyGbytes, results }, peer) {
  const head = [
    "weight, rows of activations",
    "path",
    "bitsandbytes, µs",
    "dense, µs",
    "halfbyte, µs",
    "to bitsandbytes",
    "to dense",
    "its bytes at the copy's speed, µs",
    "host, µs",
  ];
  const of = (own) => {
    const rows = own.map((r) => {
      const other = peer?.products?.[r.name];
      const [theirs, dense] = [other?.bitsandbytes, other?.dense];
      const times = (time) => (time === undefined ? "-" : `${(time / r.microseconds).toFixed(2)}x`);
      const floor = (r.bytes / copyGbytes / 1e3).toFixed(1);
      const shown = (time) => time?.toFixed(1) ?? "-";
      const cells = [r.name, r.path, shown(theirs), shown(dense), shown(r.microseconds), times(theirs), times(dense)];
      return [...cells, floor, shown(r.hostMicroseconds)];
    });
    const wrong = own.filter((r) => r.wrong !== undefined).map((r) => `WRONG: ${r.name}: ${r.wrong}`);
    return own.length === 0 ? undefined : [table(head, rows), ...wrong].join("\n");
  };
  const small = ({ n, k }) => Math.min(n, k) < SMALLEST_LARGE;
  return {
    "cuda-products": of(results.filter((r) => !small(r))),
    "cuda-products-small": of(results.filter(small)),
  };
}

/** The shorter side of the smallest weight of a large model that is measured. */
const SMALLEST_LARGE = 4096;

/** The sections of `npm run bench -- --what products,optimizers --json` on the cpu. */
function cpuSections({ machine, products, peerProducts, optimizers = [], peerOptimizers }) {
  return {
    ...(products.length > 0 && cpuProductSections({ machine, products, peerProducts })),
    ...(optimizers.length > 0 && cpuOptimizerSections({ machine, optimizers, peerOptimizers })),
  };
}

/** Steps: parameters and bytes per second. */
function cpuOptimizerSections({ machine, optimizers, peerOptimizers }) {
  const threads = [...new Set(optimizers.map((r) => r.threads))];
  const plural = (count, what) => `${count} ${what}${count > 1 ? "s" : ""}`;
  const ways = [
    ["bitsandbytes", ""],
    ["torch fused", "torch fused "],
    ["torch foreach", "torch foreach "],
  ];
  const rows = [...new Set(optimizers.map((r) => r.name))].map((name) => {
    const own = threads.map((count) => optimizers.find((r) => r.name === name && r.threads === count));
    const parameters = own[0].gelem * own[0].milliseconds * 1e6;
    const cells = own.flatMap((r) => [(r.gelem * 1e3).toFixed(0), `${r.gbytes.toFixed(1)}, ${percent(r.ofCopy)}`]);
    const others = peerOptimizers
      ? ways.map(([, prefix]) => {
          const rates = threads.map((count) => {
            const time = peerOptimizers[count]?.ops[prefix + own[0].peer];
            return time === undefined ? undefined : (parameters / time).toFixed(0);
          });
          return rates.includes(undefined) ? "-" : rates.join(" / ");
        })
      : [];
    const gain = threads.length > 1 ? [`${(own[0].milliseconds / own.at(-1).milliseconds).toFixed(2)}x`] : [];
    return [name, ...cells, ...gain, ...others];
  });
  const beside = peerOptimizers ? ` Beside: ${peerOptimizers[threads[0]].versions}.` : "";
  const where = `${machine.cpu}, ${machine.cores} cores, Node ${machine.node} ${machine.arch}; 10^6 parameters per second.${beside}`;
  const ours = threads.flatMap((count) => [`${plural(count, "worker")}, M/s`, "GB/s, of copy"]);
  const theirs = peerOptimizers
    ? ways.map(([name]) => `${name}, ${threads.map((n) => plural(n, "thread")).join(" / ")}, M/s`)
    : [];
  const head = ["", ...ours, ...(threads.length > 1 ? ["speed-up"] : []), ...theirs];
  const wrong = optimizers.filter((r) => r.wrong !== undefined).map((r) => `WRONG: ${r.name}: ${r.wrong}`);
  return { "cpu-optimizers": [where, "", table(head, rows), ...wrong].join("\n") };
}

/** Multiply-adds per second. */
function cpuProductSections({ machine, products, peerProducts }) {
  const threads = [...new Set(products.map((r) => r.threads))];
  const workers = (count) => `${count} worker${count > 1 ? "s" : ""}`;
  const ours = threads.map((count) => `${workers(count)}, G/s`);
  const theirs = peerProducts
    ? threads.map((count) => `bitsandbytes, ${count} thread${count > 1 ? "s" : ""}, G/s`)
    : [];
  const rows = [...new Set(products.map((r) => r.name))].map((name) => {
    const own = threads.map((count) => products.find((r) => r.name === name && r.threads === count));
    const other = peerProducts
      ? threads.map((count) => {
          const time = own[0].peer && peerProducts[count]?.[own[0].peer];
          return time ? ((own[0].gelem * own[0].milliseconds) / time).toFixed(1) : "-";
        })
      : [];
    const gain = threads.length > 1 ? [`${(own.at(-1).gelem / own[0].gelem).toFixed(2)}x`] : [];
    return [name, ...own.map((r) => r.gelem.toFixed(1)), ...gain, ...other];
  });
  const where = `${machine.cpu}, ${machine.cores} cores, Node ${machine.node} ${machine.arch}; 10^9 multiply-adds per second.`;
  const head = ["", ...ours, ...(threads.length > 1 ? ["speed-up"] : []), ...theirs];
  return { "cpu-products": [where, "", table(head, rows)].join("\n") };
}

const isLaunch = ({ name }) => name.startsWith("launch of ") && name.endsWith(", host");
const reached = (figure, met) => (met ? figure : `**${figure}**`);
const added = ([plain, nested]) => [
  plain.toFixed(1),
  nested.toFixed(1),
  `${(nested - plain).toFixed(1)} µs, ${percent(nested / plain - 1)}`,
];

/** One row for what is measured twice: until the host is free, and until the GPU is done. */
function launchTable(launches) {
  const rows = new Map();
  for (const { name, microseconds } of launches) {
    const [, what, end] = /^(.*), (host|until done)$/.exec(name) ?? [undefined, name, "until done"];
    rows.set(what, { ...rows.get(what), [end]: micro(microseconds) });
  }
  const cells = [...rows].map(([what, time]) => [what, time.host ?? "-", time["until done"]]);
  return table(["each of", "host", "until done"], cells);
}

/** The section of `node bench/sass.mjs --json`. */
function sassSections(rows) {
  const boards = Object.keys(rows[0].boards);
  const head = [
    "kernel",
    "bytes",
    "instructions",
    "float",
    "integer",
    "shared, shuffles",
    "per byte",
    ...boards.map((b) => `${b}: of its memory's time`),
  ];
  const cells = rows
    .filter(({ entry }) => SASS.test(entry))
    .map(({ entry, elements, bytes, instructions, kinds, boards: shares }) => [
      `\`${entry}\``,
      bytes.toFixed(2),
      instructions.toFixed(1),
      (kinds.float / elements).toFixed(1),
      (kinds.integer / elements).toFixed(1),
      ((kinds.shared + kinds.shuffle) / elements).toFixed(1),
      (instructions / bytes).toFixed(1),
      ...boards.map((board) => percent(shares[board])),
    ]);
  return { sass: table(head, cells) };
}

const sections = {};
for (const path of positionals) {
  const found = JSON.parse(readFileSync(path, "utf8"));
  if (Array.isArray(found)) Object.assign(sections, sassSections(found));
  else Object.assign(sections, found.gpu ? benchSections(found) : cpuSections(found));
}
const given = Object.entries(sections).filter(([, text]) => text !== undefined);
if (options.write) {
  let text = readFileSync(DOCS, "utf8");
  for (const [name, section] of given) {
    const mark = `<!-- table: ${name} -->\n`;
    const from = text.indexOf(mark) + mark.length;
    const to = text.indexOf("<!-- end -->", from);
    if (from < mark.length || to < 0) throw new Error(`docs/benchmarks.md has no section ${name}`);
    text = `${text.slice(0, from)}${section}\n${text.slice(to)}`;
  }
  writeFileSync(`${DOCS}.new`, text);
  renameSync(`${DOCS}.new`, DOCS);
  console.log(`docs/benchmarks.md: ${given.map(([name]) => name).join(", ")}`);
} else {
  for (const [name, section] of given) console.log(`<!-- table: ${name} -->\n${section}\n<!-- end -->\n`);
}
