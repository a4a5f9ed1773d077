// Writes docs/support.md from the registry; with --check only says whether it is up to date.
import { readFileSync, writeFileSync } from "node:fs";
import { CPU_KERNELS } from "../dist/backend/cpu/kernels.js";
import { CUDA_KERNELS } from "../dist/backend/cuda/kernels.js";
import { PRIMITIVE_NAMES, PRIMITIVES } from "../dist/ops/registry.js";

const file = new URL("../docs/support.md", import.meta.url);
const rows = PRIMITIVE_NAMES.map((name) => {
  const { upstream, family, kernels, dtypes, golden, summary } = PRIMITIVES[name];
  const support = (table) =>
    kernels.every((kernel) => kernel in table) ? (kernels.length > 0 ? "yes" : "host") : "no";
  const checked = typeof golden === "string" ? `\`${golden}\`` : golden.none;
  return `| \`${name}\` | \`${upstream}\` | ${family} | ${dtypes.join(" ")} | ${support(CPU_KERNELS)} | ${support(CUDA_KERNELS)} | ${checked} | ${summary} |`;
});
const text = `# Support

Generated from \`src/ops/registry.ts\` by \`npm run support\`. *host*: computed by JavaScript, on no device.

| primitive | upstream | family | dtypes | cpu | cuda | golden cases | what it is |
|---|---|---|---|---|---|---|---|
${rows.join("\n")}
`;

if (!process.argv.includes("--check")) writeFileSync(file, text);
else if (readFileSync(file, "utf8") !== text) {
  console.error("docs/support.md is out of date: npm run support");
  process.exit(1);
}
