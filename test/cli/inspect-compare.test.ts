import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { makeTinyModel } from "../../scripts/make-tiny-model.mjs";
import { halfbyte, parseOnly } from "../helpers/cli.js";
import { ggufBytes, TINY_LLAMA, tinyModel } from "../helpers/gguf-writer.js";
import { f32Tensor, writeModel } from "../helpers/model-folder.js";

const folder = mkdtempSync(join(tmpdir(), "halfbyte-cli-"));
afterAll(() => rmSync(folder, { recursive: true }));
const tiny = join(folder, "tiny");
const nf4 = join(folder, "nf4");
const gguf = join(folder, "tiny.gguf");
beforeAll(async () => {
  await makeTinyModel(tiny, { tied: false });
  await halfbyte(["quantize", tiny, nf4, "--double-quant", "--skip", "k_proj"]);
  const spec = tinyModel({
    ...TINY_LLAMA,
    layers: 1,
    types: ["Q4_1", "F16", "Q8_0"],
    tied: true,
  });
  writeFileSync(gguf, ggufBytes(spec));
});

describe("halfbyte inspect", () => {
  it("lists tensors as they are used, what they are stored as, and totals", async () => {
    const { code, stdout, stderr } = await halfbyte(["inspect", nf4]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    expect(stdout).toMatch(/^tensor +shape +stored as +bits +on disk +in memory$/m);
    expect(stdout).toMatch(
      /^model\.layers\.0\.mlp\.gate_proj\.weight +352 x 128 +nf4\/64 nested +4\.35 +24\.5 kB +24\.3 kB$/m,
    );
    expect(stdout).toMatch(/^lm_head\.weight +512 x 128 +BF16 +16\.00 +131\.1 kB +131\.1 kB$/m);
    expect(stdout).toMatch(
      /^quantization +bitsandbytes nf4, double quantization, computes in bf16, skips lm_head, k_proj$/m,
    );
    // Aligned: the heading of the last column ends where its cells do.
    const lines = stdout.split("\n");
    expect(new Set(lines.slice(0, 5).map((line) => line.length)).size).toBe(1);
  });

  it("prints JSON, of a GGUF file too", async () => {
    const folderReport = parseOnly((await halfbyte(["inspect", tiny, "--json"])).stdout);
    expect(folderReport).toMatchObject({
      kind: "safetensors",
      modelType: "llama",
      quantization: null,
      bitsPerWeight: 16,
    });
    const { code, stdout, stderr } = await halfbyte(["inspect", gguf, "--json"]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    const report = parseOnly(stdout) as { kind: string; notes: string[]; tensors: Record<string, unknown>[] };
    expect(report.kind).toBe("gguf");
    expect(report.tensors[0]).toMatchObject({
      name: "model.embed_tokens.weight",
      shape: [37, 64],
      stored: "Q4_1",
      bitsPerWeight: 5,
      memoryBytes: 2 * 37 * 64,
    });
    expect(report.notes.length).toBeGreaterThan(0);
  });
});

describe("halfbyte compare", () => {
  it("prints the worst ten and totals", async () => {
    const { code, stdout, stderr } = await halfbyte(["compare", tiny, nf4]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    expect(stdout).toMatch(/^the worst 10 of 21 tensors, by relative error$/m);
    const errors = [...stdout.matchAll(/ nf4 +\d\.\d\d +(\d+\.\d+) %/g)].map((match) => Number(match[1]));
    expect(errors.length).toBe(10);
    expect(errors).toEqual([...errors].sort((a, b) => b - a));
    expect(stdout).toMatch(/^quantized +12 tensors, 352\.3 K weights$/m);
    expect(stdout).toMatch(/^relative error +9\.\d\d %$/m);
  });

  it("prints JSON: zero error for a model and itself", async () => {
    const { code, stdout } = await halfbyte(["compare", nf4, nf4, "--json", "--threads", "1"]);
    expect(code).toBe(0);
    const report = parseOnly(stdout) as { tensors: { max: number; relative: number }[]; total: { rms: number } };
    expect(report.tensors.length).toBe(21);
    expect(report.tensors.every(({ max, relative }) => max === 0 && relative === 0)).toBe(true);
    expect(report.total.rms).toBe(0);
  });

  it("exits 1 where shapes differ, and says so", async () => {
    const name = "model.layers.0.self_attn.q_proj.weight";
    const other = await writeModel(join(folder, "other"), {
      [name]: f32Tensor([1, 2], [1, 2]),
      "model.norm.weight": f32Tensor(new Float32Array(128).fill(1), [128]),
    });
    const { code, stdout } = await halfbyte(["compare", tiny, other]);
    expect(code).toBe(1);
    expect(stdout).toContain(`${name}: 128 x 128 and 1 x 2`);
    expect(stdout).toMatch(/^only in the original +.* and 14 more$/m);
  });
});
