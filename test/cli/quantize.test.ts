import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openGgufModel } from "#halfbyte/formats/gguf-model.js";
import { rowCount } from "#halfbyte/formats/source.js";
import { makeTinyModel } from "../../scripts/make-tiny-model.mjs";
import { contents, halfbyte, listing, parseOnly, until } from "../helpers/cli.js";
import { ggufBytes, TINY_LLAMA, tinyModel } from "../helpers/gguf-writer.js";
import { readModel, type TestTensor, writeHollowModel, writeModel } from "../helpers/model-folder.js";
import { encode, round } from "../helpers/scalar.js";

const folder = mkdtempSync(join(tmpdir(), "halfbyte-cli-"));
afterAll(() => rmSync(folder, { recursive: true }));
const tiny = join(folder, "tiny");
beforeAll(() => makeTinyModel(tiny));

let count = 0;
const fresh = (): string => join(folder, `out${count++}`);
/** Anything that a failed or interrupted run could have left. */
const leftovers = (): string[] => listing(folder).filter((name) => name.startsWith("."));

async function quantize(src: string, ...options: string[]): Promise<string> {
  const out = fresh();
  const { code, stderr } = await halfbyte(["quantize", src, out, ...options]);
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  return out;
}

const configOf = (out: string) => JSON.parse(readFileSync(join(out, "config.json"), "utf8"));

describe("halfbyte quantize", () => {
  it("makes a folder and says what it did", async () => {
    const out = fresh();
    const { code, stdout, stderr } = await halfbyte(["quantize", tiny, out]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    expect(stdout).toMatch(/^source +.*tiny \(safetensors, 434\.8 K weights, 869\.6 kB\)$/m);
    expect(stdout).toMatch(/^quantized +14 tensors, 368\.6 K weights to nf4, blocks of 64: 4\.54 bits per weight$/m);
    expect(stdout).toMatch(/^took +\S+ s \(.* weights\/s\), .* of memory at most$/m);
    expect(stdout).not.toContain("\u001b");
    expect(listing(out)).toEqual([...listing(tiny)].sort());
  });

  it("every option does what it says", async () => {
    const nf4 = configOf(await quantize(tiny)).quantization_config;
    expect(nf4).toMatchObject({
      bnb_4bit_quant_type: "nf4",
      bnb_4bit_compute_dtype: "bfloat16",
      llm_int8_skip_modules: null,
    });
    const fp4 = await readModel(await quantize(tiny, "--type", "fp4", "--blocksize", "128"));
    const name = "model.layers.0.self_attn.q_proj.weight";
    const state = fp4.get(`${name}.quant_state.bitsandbytes__fp4`)!;
    expect(Buffer.from(state.bytes).toString()).toContain('"blocksize": 128');

    const nested = await quantize(tiny, "--double-quant", "--compute-dtype", "float16");
    expect((await readModel(nested)).get(`${name}.nested_absmax`)?.dtype).toBe("F32");
    expect((await readModel(nested)).get("model.norm.weight")?.dtype).toBe("F16");
    expect(configOf(nested)).toMatchObject({
      dtype: "float16",
      quantization_config: { bnb_4bit_use_double_quant: true },
    });

    const int8 = await quantize(tiny, "--type", "int8");
    expect((await readModel(int8)).get(name)).toMatchObject({ dtype: "I8", shape: [128, 128] });
    expect(configOf(int8).quantization_config).toMatchObject({ load_in_8bit: true });

    const skipping = await quantize(tiny, "--skip", "o_proj", "--skip", "model\\.layers\\.1\\.mlp");
    const kept = [...(await readModel(skipping))].filter(
      ([key, { dtype }]) => key.includes("_proj.weight") && dtype === "BF16",
    );
    expect(kept.map(([key]) => key).sort()).toEqual([
      "model.layers.0.self_attn.o_proj.weight",
      "model.layers.1.mlp.down_proj.weight",
      "model.layers.1.mlp.gate_proj.weight",
      "model.layers.1.mlp.up_proj.weight",
      "model.layers.1.self_attn.o_proj.weight",
    ]);
    expect(configOf(skipping).quantization_config.llm_int8_skip_modules).toEqual([
      "lm_head",
      "o_proj",
      "model\\.layers\\.1\\.mlp",
    ]);
  });

  it("--json prints one object and nothing else", async () => {
    const out = fresh();
    const { code, stdout, stderr } = await halfbyte(["quantize", tiny, out, "--json", "--double-quant"]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    const report = parseOnly(stdout);
    expect(report).toMatchObject({
      source: { kind: "safetensors", bytes: 869632 },
      out,
      type: "nf4",
      blocksize: 64,
      doubleQuant: true,
      parameters: 434816,
      quantizedParameters: 368640,
      notes: [],
    });
    expect(report.peakMemoryBytes).toBeGreaterThan(1e7);
    expect((report.quantized as unknown[]).length).toBe(14);
    expect((report.kept as unknown[]).length).toBe(6);
  });

  it("writes shards of at most --max-shard-size with an index", async () => {
    const out = await quantize(tiny, "--max-shard-size", "100kB");
    const shards = listing(out).filter((file) => /^model-\d{5}-of-\d{5}\.safetensors$/.test(file));
    expect(shards.length).toBeGreaterThan(2);
    const index = JSON.parse(readFileSync(join(out, "model.safetensors.index.json"), "utf8"));
    expect(new Set(Object.values(index.weight_map))).toEqual(new Set(shards));
    expect(existsSync(join(out, "model.safetensors"))).toBe(false);
    expect(await readModel(out)).toEqual(
      new Map([...(await readModel(await quantize(tiny)))].sort(byKeyOf(await readModel(out)))),
    );
  });

  it("gives the same bytes for 1, 2, 3 and 8 threads", async () => {
    for (const options of [[], ["--double-quant"], ["--type", "int8"]]) {
      const first = contents(await quantize(tiny, "--threads", "1", ...options));
      for (const threads of ["2", "3", "8"]) {
        expect(contents(await quantize(tiny, "--threads", threads, ...options))).toEqual(first);
      }
    }
  });

  it("gives a GGUF file's weights the same codes as its Hugging Face folder's", async () => {
    const spec = tinyModel({
      ...TINY_LLAMA,
      layers: 2,
      types: ["Q4_1", "F16", "Q8_0", "BF16", "F32", "Q5_0"],
    });
    const gguf = join(folder, "tiny.gguf");
    writeFileSync(gguf, ggufBytes(spec));
    const source = await openGgufModel(gguf);
    const tensors: Record<string, TestTensor> = {};
    for (const { name, dtype, shape } of source.tensors.values()) {
      const bytes = await source.readRows(name, 0, rowCount(shape));
      tensors[name] = { dtype: "BF16", shape, bytes: dtype === "BF16" ? bytes : asBf16(dtype, bytes) };
    }
    const hf = await writeModel(join(folder, "from-gguf"), tensors, source.config);
    await source.close();
    for (const options of [["--type", "nf4"], ["--type", "fp4"], ["--double-quant"], ["--type", "int8"]]) {
      const a = await quantize(gguf, ...options);
      const b = await quantize(hf, ...options);
      expect(await readModel(a)).toEqual(await readModel(b));
      expect(configOf(a)).toEqual(configOf(b));
      expect(listing(a)).toContain("generation_config.json");
    }
  });
});

function asBf16(dtype: string, bytes: Uint8Array<ArrayBuffer>): Uint8Array {
  const floats =
    dtype === "F32"
      ? new Float32Array(bytes.buffer)
      : Float32Array.from(new Uint16Array(bytes.buffer), (bits) => halfValue(bits));
  return new Uint8Array(Uint16Array.from(floats, (v) => encode("bf16", round("bf16", v))).buffer);
}

function halfValue(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 31;
  const mantissa = bits & 0x3ff;
  return exponent === 0 ? sign * mantissa * 2 ** -24 : sign * (1024 + mantissa) * 2 ** (exponent - 25);
}

/** Shards list their tensors file by file. */
function byKeyOf(order: Map<string, unknown>) {
  const keys = [...order.keys()];
  return ([a]: [string, unknown], [b]: [string, unknown]): number => keys.indexOf(a) - keys.indexOf(b);
}

describe("halfbyte quantize: an OUT that exists", () => {
  it("is refused without --force and untouched", async () => {
    const out = await quantize(tiny);
    const before = contents(out);
    const { code, stderr } = await halfbyte(["quantize", tiny, out, "--type", "fp4"]);
    expect(code).toBe(1);
    expect(stderr).toMatch(/^halfbyte: .*--force.*which exists\n$/);
    expect(contents(out)).toEqual(before);
  });

  it("--force replaces the model and keeps everything else", async () => {
    const out = await quantize(tiny, "--max-shard-size", "100kB");
    writeFileSync(join(out, "README.md"), "mine");
    mkdirSync(join(out, "notes"));
    writeFileSync(join(out, "tokenizer.model"), "of another tokenizer");
    await halfbyte(["quantize", tiny, out, "--type", "fp4", "--force"]);
    expect(listing(out)).toEqual([...listing(tiny), "README.md", "notes"].sort());
    expect(readFileSync(join(out, "README.md"), "utf8")).toBe("mine");
    expect(configOf(out).quantization_config.bnb_4bit_quant_type).toBe("fp4");
    const again = await quantize(tiny, "--type", "fp4");
    expect(contents(again).get("model.safetensors")).toEqual(readFileSync(join(out, "model.safetensors")));
  });

  it("--force takes an empty folder, and a link to one", async () => {
    const out = fresh();
    mkdirSync(out);
    const link = fresh();
    symlinkSync(out, link);
    const { code } = await halfbyte(["quantize", tiny, link, "--force"]);
    expect(code).toBe(0);
    expect(listing(out)).toEqual(listing(tiny));
  });

  it("is refused even with --force where it is the source, a file, or no model's folder", async () => {
    const before = contents(tiny);
    const same = await halfbyte(["quantize", tiny, `${tiny}/`, "--force"]);
    expect(same).toMatchObject({ code: 1, stderr: expect.stringContaining("another folder than the source") });
    const link = fresh();
    symlinkSync(tiny, link);
    expect(await halfbyte(["quantize", tiny, link, "--force"])).toMatchObject({ code: 1 });
    expect(contents(tiny)).toEqual(before);

    const file = fresh();
    writeFileSync(file, "text");
    expect(await halfbyte(["quantize", tiny, file, "--force"])).toMatchObject({
      code: 1,
      stderr: expect.stringContaining(`the file ${file}`),
    });
    const home = fresh();
    mkdirSync(home);
    writeFileSync(join(home, "letter.txt"), "dear");
    expect(await halfbyte(["quantize", tiny, home, "--force"])).toMatchObject({
      code: 1,
      stderr: expect.stringContaining("holds files but no config.json"),
    });
    expect(listing(home)).toEqual(["letter.txt"]);
  });

  it("a failed --force leaves the old model as it was", async () => {
    const out = await quantize(tiny);
    const before = contents(out);
    const { code, stderr } = await halfbyte(["quantize", tiny, out, "--force", "--type", "int8"], {
      prelude: "ulimit -f 100;",
    });
    expect(code).toBe(1);
    expect(stderr).toMatch(/^halfbyte: .*cannot be written: EFBIG[^\n]*\n$/);
    expect(contents(out)).toEqual(before);
  });
});

describe("halfbyte quantize: failures and Ctrl-C leave nothing", () => {
  it("a file that cannot be written in full (as on a full disk)", async () => {
    const parent = fresh();
    const { code, stderr } = await halfbyte(["quantize", tiny, join(parent, "a", "out")], {
      prelude: "ulimit -f 100;",
    });
    expect(code).toBe(1);
    expect(stderr).toMatch(/^halfbyte: .*cannot be written: EFBIG[^\n]*\n$/);
    expect(existsSync(parent)).toBe(false);
  });

  it("a place that cannot be written to", async () => {
    const { code, stderr } = await halfbyte(["quantize", tiny, "/proc/nowhere/out"]);
    expect(code).toBe(1);
    expect(stderr).toMatch(/^halfbyte: .*cannot be written: [^\n]*\n$/);
  });

  it("a disk without room for it is noticed before anything is written", async () => {
    // 4 TB of zeros in a file with a hole.
    const src = writeHollowModel(fresh(), 1 << 20, 1 << 21);
    const out = fresh();
    const { code, stderr } = await halfbyte(["quantize", src, out]);
    expect(code).toBe(1);
    expect(stderr).toMatch(/the checkpoint takes \d+ bytes, the disk has \d+ left\n$/);
    expect(existsSync(out)).toBe(false);
    expect(leftovers()).toEqual([]);
  });

  for (const [signal, exit] of [
    ["SIGINT", 130],
    ["SIGTERM", 143],
  ] as const) {
    for (const json of [[], ["--json"]]) {
      it(`${signal} ${json}: exit ${exit}`, async () => {
        const src = writeHollowModel(fresh(), 1 << 15, 1 << 15);
        const parent = fresh();
        const { code, stdout, stderr } = await halfbyte(["quantize", src, join(parent, "out"), ...json], {
          onStart: (child) => {
            const writing = () => existsSync(parent) && readdirSync(parent).some((name) => name.startsWith(".out"));
            void until(writing).then(() => child.kill(signal));
          },
        });
        expect(code).toBe(exit);
        if (json.length > 0) expect(parseOnly(stdout)).toMatchObject({ error: { code: "ERR_INTERRUPTED" } });
        else
          expect({ stdout, stderr }).toEqual({
            stdout: "",
            stderr: `halfbyte: interrupted by ${signal}, nothing is left of it\n`,
          });
        expect(existsSync(parent)).toBe(false);
        rmSync(src, { recursive: true });
      });
    }
  }

  it("Ctrl-C during --force leaves the old model as it was", async () => {
    const src = writeHollowModel(fresh(), 1 << 15, 1 << 15);
    const out = await quantize(tiny);
    const before = contents(out);
    const { code } = await halfbyte(["quantize", src, out, "--force"], {
      onStart: (child) => {
        const writing = () => listing(out).some((name) => name.startsWith(".halfbyte"));
        void until(writing).then(() => child.kill("SIGINT"));
      },
    });
    expect(code).toBe(130);
    expect(contents(out)).toEqual(before);
    rmSync(src, { recursive: true });
  });

  it("takes less than 1 GB of memory for a weight of 2 GB", async () => {
    const src = writeHollowModel(fresh(), 1 << 15, 1 << 15);
    const out = fresh();
    const { code, stdout } = await halfbyte(["quantize", src, out, "--json", "--double-quant"]);
    expect(code).toBe(0);
    expect(parseOnly(stdout).peakMemoryBytes).toBeLessThan(6e8);
    for (const path of [src, out]) rmSync(path, { recursive: true });
  });
});
