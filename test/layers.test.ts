/** The shape of the source tree: imports go down the layers only, without cycles, and files stay short. */
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";
import { expect, test } from "vitest";

/** Each imports only from those before it, and from itself; checkpoint and golden stand side by side. */
const LAYERS = ["core", "backend", "quant", "ops", "formats", "optim", "checkpoint", "golden", "cli"];
const LINES = 600;

function sources(folder: string): string[] {
  return readdirSync(folder, { recursive: true, encoding: "utf8" })
    .filter((f) => f.endsWith(".ts") && !f.includes("generated"))
    .map((f) => join(folder, f));
}

const imports = new Map(
  sources("src").map((file) => {
    const targets = [...readFileSync(file, "utf8").matchAll(/from "(\.[^"]+)\.js"/g)];
    return [file, targets.map(([, path]) => normalize(join(dirname(file), `${path}.ts`)))] as const;
  }),
);
const layerOf = (file: string): number => LAYERS.indexOf(file.split("/")[1]!);

test("imports go down the layers", () => {
  expect(imports.size).toBeGreaterThan(50);
  const bad: string[] = [];
  for (const [file, targets] of imports) {
    if (file === "src/index.ts") continue;
    expect(layerOf(file), `${file} is in no layer`).toBeGreaterThanOrEqual(0);
    for (const target of targets) {
      if (layerOf(target) > layerOf(file)) bad.push(`${file} imports ${target}`);
      if (file.startsWith("src/golden") && target.startsWith("src/checkpoint")) bad.push(`${file} imports ${target}`);
    }
  }
  expect(bad).toEqual([]);
});

test("no import cycles", () => {
  const state = new Map<string, "open" | "done">();
  const visit = (file: string, path: string[]): void => {
    if (state.get(file) === "done") return;
    if (state.get(file) === "open") expect.fail([...path.slice(path.indexOf(file)), file].join(" -> "));
    state.set(file, "open");
    for (const target of imports.get(file) ?? []) visit(target, [...path, file]);
    state.set(file, "done");
  };
  for (const file of imports.keys()) visit(file, []);
});

test("every file stays under 600 lines", () => {
  const long = ["asm", "src", "test", "bench"]
    .flatMap(sources)
    .filter((file) => readFileSync(file, "utf8").split("\n").length > LINES);
  expect(long).toEqual([]);
});
