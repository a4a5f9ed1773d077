/**
 * Asks readelf whether the addons would load where they must: the right architecture, no symbol newer than JetPack 5's glibc,
 * no other library than glibc's own, and small. Checks prebuilds/, or the files that are named.
 */
import { execFileSync } from "node:child_process";
import { existsSync, statSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const MACHINES = { "linux-x64": "Advanced Micro Devices X86-64", "linux-arm64": "AArch64" };
/** Ubuntu 20.04, JetPack 5. */
const GLIBC = [2, 31];
const LIBRARIES = /^(lib(c|m|dl|pthread)\.so\.\d+|ld-linux-(x86-64|aarch64)\.so\.\d+)$/;
const MOST_BYTES = 128 * 1024;

const readelf = (...args) =>
  execFileSync("readelf", ["--wide", ...args], { encoding: "utf8", env: { ...process.env, LC_ALL: "C" } });

/** @returns {string[]} what is wrong with the file */
function problems(file, target) {
  const found = [];
  const machine = /Machine:\s*(.+)/.exec(readelf("--file-header", file))?.[1];
  if (machine !== MACHINES[target]) found.push(`it is for ${machine}`);

  const dynamic = readelf("--dynamic", file);
  const needed = [...dynamic.matchAll(/\(NEEDED\).*\[(.+)\]/g)].map((m) => m[1]);
  if (!needed.includes("libc.so.6")) found.push("it does not name libc.so.6: is it an addon?");
  for (const library of needed) if (!LIBRARIES.test(library)) found.push(`it needs ${library}`);
  if (/\((RPATH|RUNPATH|TEXTREL)\)/.test(dynamic)) found.push("it has a library path or text relocations");

  for (const [, symbol, version] of readelf("--dyn-syms", file).matchAll(/ UND (\S+?)@+(\S+)/g)) {
    const glibc = /^GLIBC_(\d+)\.(\d+)/.exec(version);
    const newer = glibc && (Number(glibc[1]) - GLIBC[0] || Number(glibc[2]) - GLIBC[1]) > 0;
    if (!glibc || newer) found.push(`it needs ${symbol}@${version}`);
  }
  const exported = [...readelf("--dyn-syms", file).matchAll(/ GLOBAL +DEFAULT +\d+ (\S+)/g)].map((m) => m[1]);
  if (!exported.includes("napi_register_module_v1")) found.push("it is no Node-API module");
  const stray = exported.filter((name) => !/^(napi|node_api)_/.test(name));
  if (stray.length > 0) found.push(`it exports ${stray.join(", ")}`);
  for (const [, name] of readelf("--dyn-syms", file).matchAll(/ UND ((?:cu[A-Z]|_Z|__cxa_throw|_Unwind)\S*)/g)) {
    found.push(`it refers to ${name}`);
  }

  if (statSync(file).size > MOST_BYTES) found.push(`it is larger than ${MOST_BYTES / 1024} KB`);
  return found;
}

const named = process.argv.slice(2);
const files = named.length ? named : Object.keys(MACHINES).map((t) => join(ROOT, "prebuilds", t, "halfbyte.node"));
for (const file of files) {
  const target = Object.keys(MACHINES).find((t) => file.includes(t)) ?? basename(dirname(file));
  const found = existsSync(file) ? problems(file, target) : ["there is no such file (npm run build:addon -- --all)"];
  for (const problem of found) console.error(`${file}: ${problem}`);
  if (found.length) process.exitCode = 1;
  else console.log(`${file}: ${target}, ${(statSync(file).size / 1024).toFixed(0)} KB, fine`);
}
