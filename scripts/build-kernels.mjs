/**
 * Compiles csrc/kernels into images and their manifest.
 *
 *   build-kernels.mjs                    the package's images into dist/backend/cuda/kernels, by pinned NVRTC wheels
 *   build-kernels.mjs --nvcc             images of this machine's nvcc into build/kernels-nvcc
 *   build-kernels.mjs --nvrtc VERSION    another NVRTC's into build/kernels-nvrtc-VERSION
 *
 * Options: --arch sm_87,compute_80 (only these; without --nvcc or --nvrtc into build/kernels-nvrtc), --out FOLDER,
 * --verbose (a line for each kernel).
 *
 * Every driver since CUDA 11.8 loads what 11.8 made; what CUDA 13 made is loaded by drivers of 13 and later only. So the
 * older compiler makes everything it can, and the newer one what it alone knows.
 */
import { execFile, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { availableParallelism } from "node:os";
import { join, relative, resolve } from "node:path";
import { parseArgs, promisify } from "node:util";
import { readCubin } from "./cubin.mjs";
import { COMPILE_OPTIONS, kernelFiles, kernelSources, ROOT } from "./kernel-sources.mjs";
import { NvrtcMissing, nvrtc, PYTHON } from "./nvrtc.mjs";

const run = promisify(execFile);
const RELEASE = "11.8.89";
const RELEASE_FOLDER = "dist/backend/cuda/kernels";
/** Which NVRTC makes an architecture of the package that RELEASE does not know. */
const RELEASE_LATER = { sm_110: "13.0.88" };
const TARGETS = ["sm_87", "sm_72", "sm_110", "compute_80"];
/** nvcc's words for options that NVRTC spells differently or does not have. */
const NVCC_OPTIONS = { "-default-device": "--expt-relaxed-constexpr" };

/** NVRTC lacks the operator that assertions about operand structs use; this is what its front end has instead. */
/** Registers and spills of each kernel, in the log; changes no code. */
const REPORT = "--ptxas-options=-v";
/** Lines of a compiler's log that are shown. */
const LOG_LINES = 40;

/** A failure whose message is all that there is to say. */
class BuildError extends Error {}

const kindOf = (arch) => (arch.startsWith("compute_") ? "ptx" : "cubin");
const numberOf = (arch) => Number(/\d+$/.exec(arch)[0]);
/** 11080 for 11.8. */
function cudaNumber(version) {
  const [major, minor] = version.split(".").map(Number);
  return major * 1000 + minor * 10;
}

/** Which architectures NVRTC `version` knows among TARGETS. */
function known(arch, version) {
  if (arch === "sm_110") return cudaNumber(version) >= 13000;
  return arch !== "sm_72" || cudaNumber(version) < 13000;
}

/** What compiles each architecture: `{ arch, compiler, options, compile(job) }`. */
async function nvrtcTargets(archs, version) {
  if (version !== undefined) await nvrtc(version);
  const chosen = archs ?? TARGETS.filter((arch) => version === undefined || known(arch, version));
  for (const arch of TARGETS)
    if (!chosen.includes(arch) && !archs) console.log(`NVRTC ${version} does not know ${arch}: not built`);
  const targets = [];
  for (const arch of chosen) {
    const compiler = version ?? RELEASE_LATER[arch] ?? RELEASE;
    const options = [...COMPILE_OPTIONS, `--gpu-architecture=${arch}`];
    const libraries = await nvrtc(compiler);
    targets.push({ arch, compiler: `nvrtc ${compiler}`, options, compile: (job) => compileNvrtc(job, libraries) });
  }
  return targets;
}

async function compileNvrtc({ source, family, headers, arch, options, output }, libraries) {
  const kind = kindOf(arch);
  const reported = kind === "cubin" ? [...options, REPORT] : options;
  const job = { ...libraries, name: `${family}.cu`, source, headers, options: reported, kind, output };
  return new Promise((done, failed) => {
    const child = spawn(PYTHON, [join(import.meta.dirname, "nvrtc.py")], { stdio: ["pipe", "pipe", "inherit"] });
    const chunks = [];
    child.on("error", (error) => failed(new NvrtcMissing(`${PYTHON}: ${error.message}`)));
    child.stdout.on("data", (chunk) => chunks.push(chunk));
    child.stdin.on("error", () => {});
    child.on("close", (code, signal) => {
      if (code !== 0) return failed(new BuildError(`${family} ${arch}: NVRTC's process ended with ${signal ?? code}`));
      const { ok, log, error } = JSON.parse(Buffer.concat(chunks).toString());
      done({ ok, log: [log, error].filter(Boolean).join("\n") });
    });
    child.stdin.end(JSON.stringify(job));
  });
}

async function nvccTargets(archs) {
  const nvcc = await findNvcc();
  const version = /\bV(\d+\.\d+\.\d+)/.exec((await run(nvcc, ["--version"])).stdout)?.[1];
  if (!version) throw new BuildError(`${nvcc} --version names no version`);
  const lists = await Promise.all(["--list-gpu-code", "--list-gpu-arch"].map((list) => run(nvcc, [list])));
  const knownArchs = new Set(lists.flatMap(({ stdout }) => stdout.trim().split(/\s+/)));
  const unknown = (archs ?? TARGETS).filter((arch) => !knownArchs.has(arch));
  const words = `nvcc ${version} does not know ${unknown.join(", ")}`;
  if (archs && unknown.length > 0) throw new BuildError(`${words} (it knows ${[...knownArchs].join(", ")})`);
  if (unknown.length > 0) console.log(`${words}: not built`);
  const chosen = (archs ?? TARGETS).filter((arch) => knownArchs.has(arch));
  const common = COMPILE_OPTIONS.map((option) => NVCC_OPTIONS[option] ?? option);
  return chosen.map((arch) => {
    const options = [...common, `--gpu-architecture=${arch}`];
    return { arch, compiler: `nvcc ${version}`, options, compile: (job) => compileNvcc(nvcc, job) };
  });
}

async function findNvcc() {
  const toolkits = [process.env.CUDA_HOME, process.env.CUDA_PATH, "/usr/local/cuda"].filter(Boolean);
  const candidates = [process.env.NVCC, "nvcc", ...toolkits.map((folder) => join(folder, "bin/nvcc"))].filter(Boolean);
  for (const candidate of candidates) {
    const found = await run(candidate, ["--version"]).catch(() => undefined);
    if (found) return candidate;
  }
  throw new BuildError(`no nvcc (looked for ${candidates.join(", ")}): install the CUDA toolkit, or name it in NVCC`);
}

async function compileNvcc(nvcc, { folder, family, arch, options, output }) {
  const what = kindOf(arch) === "ptx" ? ["--ptx"] : ["--cubin", REPORT];
  const args = [...what, ...options, "-I", folder, "-o", output, join(folder, `${family}.cu`)];
  try {
    const { stdout, stderr } = await run(nvcc, args, { maxBuffer: 2 ** 26 });
    return { ok: true, log: `${stdout}${stderr}`.trim() };
  } catch (error) {
    return { ok: false, log: `${error.stdout ?? ""}${error.stderr ?? ""}`.trim() || error.message };
  }
}

/** Compiles every family for every target, as many at a time as there are cores. */
async function compileAll(targets, staging) {
  const { folder, families, headers: paths } = kernelFiles();
  const headers = Object.fromEntries(paths.map((path) => [path, readFileSync(join(folder, path), "utf8")]));
  const jobs = families.flatMap((family) => targets.map((target) => ({ family, ...target })));
  const results = new Array(jobs.length);
  let next = 0;
  const worker = async () => {
    while (next < jobs.length) {
      const index = next++;
      results[index] = await compileOne(jobs[index], { folder, headers, staging });
    }
  };
  await Promise.all(Array.from({ length: Math.min(availableParallelism(), jobs.length) }, worker));
  return results;
}

async function compileOne({ family, arch, compiler, options, compile }, { folder, headers, staging }) {
  const file = `${family}.${arch}.${kindOf(arch)}`;
  const source = readFileSync(join(folder, `${family}.cu`), "utf8");
  const start = performance.now();
  const { ok, log } = await compile({ folder, family, source, headers, arch, options, output: join(staging, file) });
  const milliseconds = performance.now() - start;
  return { ok, log, family, arch, compiler, options, file, milliseconds };
}

/** ptxas -v writes each kernel's line and then its spills; everything else it says is a remark. */
function readLog(log) {
  let spills = 0;
  const remarks = [];
  for (const line of log.split("\n")) {
    const spilled = /(\d+) bytes spill stores, (\d+) bytes spill loads/.exec(line);
    if (spilled) spills += Number(spilled[1]) + Number(spilled[2]);
    else if (!/^ptxas info\s*:|^\s*$/.test(line)) remarks.push(line);
  }
  return { spills, remarks: remarks.join("\n") };
}

/** What the compilers said, the same words about a family once, errors first. */
function showRemarks(results) {
  const said = new Map();
  for (const { family, arch, compiler, ok, log } of results.toSorted((a, b) => Number(a.ok) - Number(b.ok))) {
    const remarks = ok ? readLog(log).remarks : log;
    const key = `${family}\n${remarks}`;
    if (remarks) said.set(key, { family, remarks, by: [...(said.get(key)?.by ?? []), `${arch} by ${compiler}`] });
  }
  for (const { family, remarks, by } of said.values()) {
    const lines = remarks.split("\n").filter((line) => line.trim() !== "");
    const more = lines.length > LOG_LINES ? [`... and ${lines.length - LOG_LINES} more lines`] : [];
    console.error([`${family}.cu for ${by.join(", ")}:`, ...lines.slice(0, LOG_LINES), ...more].join("\n") + "\n");
  }
}

function describe(results, staging, verbose) {
  const rows = [["family", "target", "compiler", "ms", "bytes", "kernels", "registers", "spills"]];
  const kernels = [["kernel", "target", "code bytes", "registers"]];
  for (const { family, arch, compiler, file, milliseconds, log } of results) {
    const path = join(staging, file);
    const row = [family, arch, compiler, milliseconds.toFixed(0), statSync(path).size];
    if (kindOf(arch) === "ptx") rows.push([...row, "", "", ""]);
    else {
      const { entries } = readCubin(readFileSync(path));
      const registers = entries.map((entry) => entry.registers);
      rows.push([...row, entries.length, `${Math.min(...registers)}-${Math.max(...registers)}`, readLog(log).spills]);
      kernels.push(...entries.map(({ name, bytes, registers }) => [name, arch, bytes, registers]));
    }
  }
  return [rows, ...(verbose ? [kernels] : [])].map(table).join("\n\n");
}

function table(rows) {
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => String(row[column]).length)));
  const cell = (value, i) =>
    typeof value === "number" ? String(value).padStart(widths[i]) : String(value).padEnd(widths[i]);
  return rows.map((row) => row.map(cell).join("  ").trimEnd()).join("\n");
}

function manifestOf(results, staging, sources) {
  const images = results.map(({ family, arch, compiler, options, file }) => {
    const bytes = readFileSync(join(staging, file));
    const sha256 = createHash("sha256").update(bytes).digest("hex");
    const made = { compiler, cuda: cudaNumber(compiler.split(" ")[1]), options };
    return { family, file, kind: kindOf(arch), architecture: numberOf(arch), ...made, sha256, bytes: bytes.length };
  });
  return { format: 1, sources, images };
}

/** Moves the images to their place, then the manifest, then drops what it does not name. */
function publish(manifest, staging, out) {
  for (const { file } of manifest.images) renameSync(join(staging, file), join(out, file));
  writeFileSync(join(staging, "manifest.json"), JSON.stringify(manifest, null, 1) + "\n");
  renameSync(join(staging, "manifest.json"), join(out, "manifest.json"));
  const kept = new Set(["manifest.json", ...manifest.images.map(({ file }) => file)]);
  for (const file of readdirSync(out)) {
    if (!kept.has(file) && /\.(?:cubin|ptx)$/.test(file)) rmSync(join(out, file));
  }
}

function options() {
  const { values } = parseArgs({
    options: {
      nvcc: { type: "boolean" },
      nvrtc: { type: "string" },
      arch: { type: "string" },
      out: { type: "string" },
      verbose: { type: "boolean" },
    },
  });
  if (values.nvcc && values.nvrtc) throw new BuildError("--nvcc and --nvrtc exclude each other");
  const archs = values.arch?.split(",").map((arch) => arch.trim());
  const strange = archs?.find((arch) => !/^(?:sm|compute)_\d+$/.test(arch));
  if (strange !== undefined) throw new BuildError(`--arch: expected names as sm_87 or compute_80, received ${strange}`);
  return { ...values, archs, out: values.out ? resolve(values.out) : join(ROOT, defaultFolder(values)) };
}

/** The package's folder gets the package's images only, and all of them. */
function defaultFolder({ nvcc, nvrtc, arch }) {
  if (nvcc) return "build/kernels-nvcc";
  if (nvrtc) return `build/kernels-nvrtc-${nvrtc}`;
  return arch ? "build/kernels-nvrtc" : RELEASE_FOLDER;
}

async function main() {
  const { nvcc, nvrtc: version, archs, out, verbose } = options();
  // The hash is of the sources as they are before they are read: one that changes meanwhile shows as stale.
  const sources = kernelSources();
  const targets = await (nvcc ? nvccTargets(archs) : nvrtcTargets(archs, version));
  mkdirSync(out, { recursive: true });
  const staging = mkdtempSync(`${out}.`);
  process.once("exit", () => rmSync(staging, { recursive: true, force: true }));
  for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, () => process.exit(1));

  const results = await compileAll(targets, staging);
  showRemarks(results);
  const failed = results.filter(({ ok }) => !ok);
  if (failed.length > 0) {
    const names = failed.map(({ family, arch }) => `${family} ${arch}`).join(", ");
    throw new BuildError(`${failed.length} of ${results.length} images failed: ${names}. Nothing was changed.`);
  }
  console.log(describe(results, staging, verbose));
  const manifest = manifestOf(results, staging, sources);
  publish(manifest, staging, out);
  const bytes = manifest.images.reduce((sum, image) => sum + image.bytes, 0);
  console.log(
    `${manifest.images.length} images, ${(bytes / 1024).toFixed(0)} KB, in ${relative(process.cwd(), out) || "."}`,
  );
}

try {
  await main();
} catch (error) {
  if (error instanceof NvrtcMissing) {
    console.error(`the kernels cannot be built with NVRTC here: ${error.message}`);
    const there = existsSync(join(ROOT, RELEASE_FOLDER, "manifest.json"));
    console.error(
      there
        ? `${RELEASE_FOLDER} stays as it is.`
        : `Without ${RELEASE_FOLDER} the build has no cuda backend; everything else works, on cpu.`,
    );
    console.error("With a CUDA toolkit, `npm run build:kernels -- --nvcc` makes kernels for use on this machine.");
  } else console.error(error instanceof BuildError || error.code?.startsWith("ERR_PARSE_ARGS") ? error.message : error);
  process.exitCode = 1;
}
