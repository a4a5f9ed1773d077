/**
 * The package as a new user meets it: packed, installed in an empty folder, and run there.
 *
 *   test-package.mjs           on this machine: the command, a program of ten lines, the type declarations with and without
 *                              library checks, the native addon
 *   test-package.mjs --arm64   on an emulated arm64 machine: the command, the program, the native addon
 *   test-package.mjs --all     both
 *
 * Needs what `npm run build:release` makes, and a machine without an NVIDIA driver.
 */
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";

const LIMIT_BYTES = 10e6;
const EXPECTED =
  /^(dist\/|prebuilds\/linux-(x64|arm64)\/halfbyte\.node$|package\.json$|README\.md$|LICENSE$|CHANGELOG\.md$)/;
const KERNELS = "dist/backend/cuda/kernels";
/** What npm would run at a user's. */
const INSTALL_SCRIPTS = ["preinstall", "install", "postinstall", "prepare"];

const root = resolve(import.meta.dirname, "..");
const folder = mkdtempSync(join(tmpdir(), "halfbyte-package-"));
const run = (command, args, options = {}) =>
  execFileSync(command, args, { cwd: folder, encoding: "utf8", stdio: ["ignore", "pipe", "inherit"], ...options });
const installed = (path) => join(folder, "node_modules", "halfbyte", path);

/** Packs what is built, and looks at what is in it. */
function pack() {
  const [{ filename, size, unpackedSize, files }] = JSON.parse(
    run("npm", ["pack", "--json", "--pack-destination", folder], { cwd: root }),
  );
  const kilobytes = (bytes) => `${(bytes / 1024).toFixed(0)} KB`;
  console.log(`${filename}: ${files.length} files, ${kilobytes(size)} packed, ${kilobytes(unpackedSize)} unpacked`);
  if (size > LIMIT_BYTES) throw new Error("the package is larger than 10 MB");
  const paths = files.map(({ path }) => path);
  const stray = paths.find((path) => !EXPECTED.test(path));
  if (stray) throw new Error(`the package contains ${stray}`);
  const needed = ["x64", "arm64"].map((arch) => `prebuilds/linux-${arch}/halfbyte.node`);
  const missing = [...needed, `${KERNELS}/manifest.json`].find((path) => !paths.includes(path));
  if (missing) throw new Error(`the package lacks ${missing}: npm run build:release makes it`);
  const { images } = JSON.parse(readFileSync(join(root, KERNELS, "manifest.json"), "utf8"));
  const listed = ["manifest.json", ...images.map(({ file }) => file)].map((file) => `${KERNELS}/${file}`).sort();
  const packed = paths.filter((path) => path.startsWith(`${KERNELS}/`)).sort();
  if (listed.join() !== packed.join())
    throw new Error(`${KERNELS} packs ${packed.join(", ")}, its manifest has ${listed.join(", ")}`);
  return filename;
}

function install(filename) {
  writeFileSync(join(folder, "package.json"), JSON.stringify({ name: "user", private: true, type: "module" }));
  run("npm", ["install", "--no-audit", "--no-fund", `./${filename}`]);
  const { scripts = {} } = JSON.parse(readFileSync(installed("package.json"), "utf8"));
  const found = INSTALL_SCRIPTS.find((name) => name in scripts);
  if (found) throw new Error(`the package has a script ${found}`);
}

/** Pages whose programs a reader may copy. */
const PAGES = ["README.md", "docs/products.md", "docs/optimizers.md"];

function programs() {
  return PAGES.flatMap((page) => {
    const found = [...readFileSync(join(root, page), "utf8").matchAll(/```ts\n([\s\S]*?)```/g)].map(([, text]) => text);
    if (found.length === 0) throw new Error(`${page} has no program`);
    return found;
  });
}

/**
 * The command, the programs and the addon, by a Node. The addon finds no driver library, which it says by a status of its own:
 * it was loaded, and dlopen was called.
 */
function tryOut(what, node) {
  const command = installed("dist/cli/main.js");
  const doctor = JSON.parse(node(command, "doctor", "--json"));
  if (!doctor.ok) throw new Error(`doctor is not well: ${JSON.stringify(doctor)}`);
  const cuda = doctor.checks.find(({ name }) => name === "cuda");
  if (!/no NVIDIA driver/.test(cuda?.detail)) throw new Error(`doctor on cuda: ${JSON.stringify(cuda)}`);
  console.log(`${what}: doctor is well; cuda: ${cuda.detail}`);

  for (const program of programs()) {
    writeFileSync(join(folder, "program.mjs"), program);
    console.log(node("program.mjs").trimEnd());
  }

  writeFileSync(join(folder, "addon.mjs"), ADDON_PROGRAM);
  console.log(`${what}: ${node("addon.mjs").trimEnd()}`);
}

const ADDON_PROGRAM = `
import { loadAddon } from "./node_modules/halfbyte/dist/backend/cuda/load.js";
import { BINDING } from "./node_modules/halfbyte/dist/backend/cuda/addon.js";
import { listImages, selectImage } from "./node_modules/halfbyte/dist/backend/cuda/images.js";
const addon = loadAddon();
const [status, detail] = [addon.open("libcuda-of-no-machine.so"), addon.detail()];
if (status !== BINDING.noLibrary) throw new Error(\`open: \${status} \${detail}\`);
const [name] = addon.describe(status);
const folder = new URL("./node_modules/halfbyte/${KERNELS}", import.meta.url).pathname;
const families = [...new Set(listImages(folder).map(({ family }) => family))];
const images = families.map((family) => selectImage(folder, family, 87, 12060).description);
console.log(\`the addon for \${process.platform}-\${process.arch} loads (\${name}: \${detail})\\n  for an Orin with JetPack 6: \${images.join("; ")}\`);
`;

function types() {
  const files = programs().map((program, i) => {
    writeFileSync(join(folder, `program${i}.ts`), program);
    return `program${i}.ts`;
  });
  const tsc = join(root, "node_modules", "typescript", "bin", "tsc");
  const common = ["--strict", "--noEmit", "--target", "es2022", "--module", "nodenext", "--types", "node"];
  const lib = ["--lib", "es2024,esnext.disposable"];
  run("npm", ["install", "--no-audit", "--no-fund", "-D", "@types/node@20"]);
  for (const check of [["--skipLibCheck"], []]) run(process.execPath, [tsc, ...common, ...lib, ...check, ...files]);
  console.log(`installed ${(statSync(installed("dist/index.js")).size / 1024).toFixed(0)} KB entry; types resolve`);
}

const { values } = parseArgs({ options: { arm64: { type: "boolean" }, all: { type: "boolean" } } });
try {
  install(pack());
  if (values.all || !values.arm64) {
    // The command as npm links it.
    run("npx", ["halfbyte", "--version"]);
    tryOut(`${process.platform}-${process.arch}`, (...args) => run(process.execPath, args));
    types();
  }
  if (values.all || values.arm64) {
    const emulator = join(root, "scripts", "arm64-node.sh");
    if (run(emulator, ["-p", "process.arch"]).trim() !== "arm64") throw new Error("the emulated Node is not for arm64");
    tryOut("linux-arm64, emulated", (...args) => run(emulator, args));
  }
} finally {
  rmSync(folder, { recursive: true });
}
