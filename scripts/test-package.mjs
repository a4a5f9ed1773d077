// The package as a new user meets it: packed, installed in an empty folder, the command run, a program of ten lines run, and
// the type declarations checked with and without library checks.
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";

const root = resolve(import.meta.dirname, "..");
const folder = mkdtempSync(join(tmpdir(), "halfbyte-package-"));
const run = (command, args, options = {}) =>
  execFileSync(command, args, { cwd: folder, encoding: "utf8", stdio: ["ignore", "pipe", "inherit"], ...options });

try {
  const [{ filename, size, files }] = JSON.parse(
    run("npm", ["pack", "--json", "--pack-destination", folder], { cwd: root }),
  );
  console.log(`${filename}: ${files.length} files, ${(size / 1024).toFixed(0)} KB packed`);
  if (size > 10e6) throw new Error("the package is larger than 10 MB");
  const stray = files
    .map((f) => f.path)
    .find((p) => !/^(dist\/|package\.json$|README\.md$|LICENSE$|CHANGELOG\.md$)/.test(p));
  if (stray) throw new Error(`the package contains ${stray}`);

  writeFileSync(join(folder, "package.json"), JSON.stringify({ name: "user", private: true, type: "module" }));
  run("npm", ["install", "--no-audit", "--no-fund", `./${filename}`]);
  const doctor = JSON.parse(run("npx", ["halfbyte", "doctor", "--json"]));
  if (!doctor.ok) throw new Error(`doctor is not well: ${JSON.stringify(doctor)}`);

  const readme = readFileSync(join(root, "README.md"), "utf8");
  const program = /```ts\n([\s\S]*?)```/.exec(readme)?.[1];
  if (!program) throw new Error("README.md has no program");
  writeFileSync(join(folder, "program.mjs"), program);
  console.log(run(process.execPath, ["program.mjs"]).trimEnd());

  writeFileSync(join(folder, "program.ts"), program);
  const tsc = join(root, "node_modules", "typescript", "bin", "tsc");
  const common = ["--strict", "--noEmit", "--target", "es2022", "--module", "nodenext", "--types", "node"];
  const lib = ["--lib", "es2024,esnext.disposable"];
  run("npm", ["install", "--no-audit", "--no-fund", "-D", "@types/node@20"]);
  for (const check of [["--skipLibCheck"], []]) run(process.execPath, [tsc, ...common, ...lib, ...check, "program.ts"]);
  console.log(
    `installed ${(statSync(join(folder, "node_modules", "halfbyte", "dist", "index.js")).size / 1024).toFixed(0)} KB entry; types resolve`,
  );
} finally {
  rmSync(folder, { recursive: true });
}
