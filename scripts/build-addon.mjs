/**
 * Compiles csrc/addon/ for this machine, into build/addon/linux-ARCH/. `--all`: for x64 and arm64, the other one by a cross
 * compiler, and puts both into prebuilds/ for packing. `--optional`: a machine that lacks what it takes is told so, and that is all.
 * Needs cmake, make (or ninja) and g++; the Node-API headers are a package of npm, so nothing is downloaded.
 */
import { spawnSync } from "node:child_process";
import { copyFileSync, existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const HEADER = join(ROOT, "csrc/addon/generated/abi.h");
const TARGETS = {
  x64: { processor: "x86_64", compiler: "x86_64-linux-gnu-g++" },
  arm64: { processor: "aarch64", compiler: "aarch64-linux-gnu-g++" },
};

const { values: options } = parseArgs({
  options: { all: { type: "boolean" }, optional: { type: "boolean" }, verbose: { type: "boolean" } },
});

const named = (prefix, name) => `${prefix}${name[0].toUpperCase()}${name.slice(1)}`;

/** The numbers that the addon shares with src/backend/cuda/. */
async function header() {
  const { BINDING, BLAS_COMMAND, BLAS_DTYPES, BLAS_STATUS, BLAS_WORDS, COMMAND_OPERANDS, COMMAND_WORDS, HOST } =
    await import("../dist/backend/cuda/addon.js");
  const { DTYPE_ID } = await import("../dist/core/dtype.js");
  const { MAX_OPERAND_BYTES } = await import("../dist/backend/cuda/layout.js");
  const statuses = Object.entries(BINDING);
  const words = (prefix, numbers) =>
    Object.entries(numbers)
      .map(([name, number]) => `constexpr uint32_t ${named(prefix, name)} = ${number};`)
      .join("\n");
  return `// Generated from src/backend/cuda/addon.ts by scripts/build-addon.mjs.
#pragma once

#include <cstdint>

#define HALFBYTE_BINDING(X) ${statuses.map(([name, number]) => `X(${name}, ${number})`).join(" ")}

namespace abi {

enum Status : int {
${statuses.map(([name, number]) => `  ${name} = ${number},`).join("\n")}
};

${words("command", COMMAND_WORDS)}
constexpr uint32_t commandOperands = ${COMMAND_OPERANDS};
constexpr uint32_t maxOperandBytes = ${MAX_OPERAND_BYTES};
constexpr int host = ${HOST};

${words("blas", BLAS_WORDS)}
constexpr uint32_t blasCommand = ${BLAS_COMMAND};
constexpr int blasStatus = ${BLAS_STATUS};
${words("dtype", Object.fromEntries(BLAS_DTYPES.map((dtype) => [dtype, DTYPE_ID[dtype]])))}

}  // namespace abi
`;
}

/** Leaves the file alone when nothing changes, so that nothing is compiled again. */
function writeHeader(text) {
  if (existsSync(HEADER) && readFileSync(HEADER, "utf8") === text) return;
  mkdirSync(dirname(HEADER), { recursive: true });
  writeFileSync(`${HEADER}.new`, text);
  renameSync(`${HEADER}.new`, HEADER);
}

const runs = (command) => spawnSync(command, ["--version"], { stdio: "ignore" }).status === 0;

/** What is missing to build at all, or undefined. */
function obstacle() {
  if (process.platform !== "linux") return `the addon is for Linux, this is ${process.platform}`;
  if (!(process.arch in TARGETS)) return `the addon is for x64 and arm64, this is ${process.arch}`;
  for (const commands of [["cmake"], ["make", "ninja"], ["g++"]]) {
    if (!commands.some(runs))
      return `there is no ${commands[0]} (Debian, Ubuntu, JetPack: apt-get install cmake make g++)`;
  }
  if (!existsSync(join(ROOT, "dist/backend/cuda/addon.js"))) return "dist/ is not built (npm run build:ts)";
}

/** @returns {Promise<string>} the file */
async function build(arch, silent) {
  const { processor, compiler } = TARGETS[arch];
  const cross = arch !== process.arch;
  if (cross && !runs(compiler)) {
    throw new Error(`there is no ${compiler} (Debian, Ubuntu: apt-get install g++-${compiler.replace("-g++", "")})`);
  }
  const out = join(ROOT, "build/addon", `linux-${arch}`);
  const { default: cmakeJs } = await import("cmake-js");
  const system = new cmakeJs.BuildSystem({
    directory: ROOT,
    out,
    arch,
    config: "Release",
    silent,
    noLog: silent,
    cMakeOptions: {
      HALFBYTE_STRICT: options.all ? "ON" : "OFF",
      ...(cross && {
        CMAKE_SYSTEM_NAME: "Linux",
        CMAKE_SYSTEM_PROCESSOR: processor,
        CMAKE_CXX_COMPILER: compiler,
      }),
    },
  });
  // An existing build folder keeps the options it was made with.
  await (options.all ? system.rebuild() : system.compile());
  return join(out, "Release", "halfbyte.node");
}

function pack(file, arch) {
  const target = join(ROOT, "prebuilds", `linux-${arch}`, "halfbyte.node");
  mkdirSync(dirname(target), { recursive: true });
  copyFileSync(file, `${target}.new`);
  renameSync(`${target}.new`, target);
  return target;
}

async function main() {
  const missing = obstacle();
  if (missing) {
    if (options.optional) return console.log(`the native addon is not built: ${missing}`);
    throw new Error(missing);
  }
  writeHeader(await header());
  if (options.all) rmSync(join(ROOT, "prebuilds"), { recursive: true, force: true });
  for (const arch of options.all ? Object.keys(TARGETS) : [process.arch]) {
    // Says nothing, or everything: the compiler's words matter when it fails.
    const file = await build(arch, !options.verbose).catch(() => build(arch, false));
    const shown = options.all ? pack(file, arch) : file;
    console.log(`${shown.slice(ROOT.length)}: ${(readFileSync(shown).length / 1024).toFixed(0)} KB`);
  }
}

main().catch((error) => {
  console.error(`the native addon could not be built: ${error.message ?? error}`);
  process.exitCode = 1;
});
