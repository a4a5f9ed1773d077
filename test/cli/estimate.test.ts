import { readFileSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { BOARDS, boardMemory, SYSTEM_BYTES } from "#halfbyte/backend/jetson.js";
import { estimateModel } from "#halfbyte/checkpoint/estimate.js";
import { formatBytes } from "#halfbyte/cli/output.js";
import { temporaryFolder } from "../helpers/checkpoint.js";
import { halfbyte, parseOnly } from "../helpers/cli.js";
import { modelConfig, writeHollowDecoder } from "../helpers/hollow-model.js";

const folder = temporaryFolder();
const model = (name: string): string => folder.file(name);
const DOCS = readFileSync(new URL("../../docs/jetson.md", import.meta.url), "utf8");
const NAMES = ["tinyllama-1.1b", "llama-3.2-1b", "qwen2.5-3b", "nemotron-nano-4b", "qwen2.5-7b", "llama-3.1-70b"];

beforeAll(() => {
  for (const name of NAMES) writeHollowDecoder(model(name), modelConfig(name));
});
afterAll(() => folder.remove());

describe("halfbyte estimate", () => {
  it("prints every part, the total and a verdict", async () => {
    const { code, stdout, stderr } = await halfbyte(["estimate", model("qwen2.5-3b"), "--fits", "orin-nano-8gb"]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    expect(stdout).toMatch(
      /^model +\S+qwen2\.5-3b \(3\.1 G weights, 2\.8 G of them nf4\)\nuse +inference, 1 sequence of 2048 tokens\n/,
    );
    for (const part of [
      "quantized weights",
      "quantization state",
      "other weights",
      "KV cache",
      "workspace",
      "runtime",
      "total",
    ]) {
      expect(stdout).toMatch(new RegExp(`^${part} +[\\d.]+ [MG]B`, "m"));
    }
    expect(stdout).toMatch(/^Orin Nano 8 GB +6\.9 GB for one program: 8\.0 GB that Linux shows on it/m);
    expect(stdout).toMatch(/^verdict +fits, [\d.]+ GB to spare$/m);
  });

  it("exits 1 when it does not fit a board that was named", async () => {
    const words = ["estimate", model("llama-3.1-70b"), "--fits"];
    const { code, stdout, stderr } = await halfbyte([...words, "orin-nx-16gb"]);
    expect({ code, stderr }).toEqual({ code: 1, stderr: "" });
    expect(stdout).toMatch(/^verdict +does not fit, [\d.]+ GB too much$/m);
    expect((await halfbyte([...words, "agx-orin-64gb", "--double-quant"])).code).toBe(0);
  });

  it("--json has the estimate and the memory it was held against", async () => {
    const options = ["--train", "--lora-rank", "8", "--lora-targets", "attention", "--optimizer", "adam8bit"];
    const sizes = ["--context", "512", "--batch", "2", "--type", "fp4", "--blocksize", "128", "--double-quant"];
    const { code, stdout } = await halfbyte([
      "estimate",
      model("tinyllama-1.1b"),
      ...options,
      ...sizes,
      "--fits",
      "xavier-nx-8gb",
      "--json",
    ]);
    expect(code).toBe(0);
    const expected = await estimateModel(model("tinyllama-1.1b"), {
      train: true,
      loraRank: 8,
      loraTargets: "attention",
      optimizer: "adam8bit",
      context: 512,
      batch: 2,
      type: "fp4",
      blocksize: 128,
      doubleQuant: true,
    });
    const { memory, ...estimate } = parseOnly(stdout);
    expect(estimate).toEqual(expected);
    expect(memory).toMatchObject({ target: "xavier-nx-8gb", fits: true, ...boardMemory(BOARDS["xavier-nx-8gb"]) });
  });

  it("without --fits tells of this machine and exits 0 whatever the verdict; --fits here does not", async () => {
    const far = ["--context", "16777216", "--batch", "1000"];
    const plain = await halfbyte(["estimate", model("llama-3.1-70b"), ...far, "--json"]);
    expect(plain.code).toBe(0);
    expect(parseOnly(plain.stdout)).toMatchObject({ memory: { target: "here", fits: false } });
    expect((await halfbyte(["estimate", model("llama-3.1-70b"), ...far, "--fits", "here"])).code).toBe(1);
  });

  const wrong: [words: string[], message: RegExp][] = [
    [["--fits", "raspberry"], /Allowed choices are orin-nano-4gb, .*agx-thor.*, here/],
    [["--lora-rank", "8"], /^halfbyte: --lora-rank is for --train\n$/],
    [["--optimizer", "adam"], /--optimizer is for --train/],
    [["--context", "0"], /a whole number from 1/],
    [["--type", "q4"], /Allowed choices are nf4, fp4, int8, bf16, f16, f32/],
  ];
  for (const [words, message] of wrong) {
    it(`${words.join(" ")}: one line, exit 2`, async () => {
      const { code, stdout, stderr } = await halfbyte(["estimate", model("tinyllama-1.1b"), ...words]);
      expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
      expect(stderr).toMatch(message);
    });
  }

  it("a model that cannot be estimated is one line, exit 1", async () => {
    const { code, stdout, stderr } = await halfbyte(["estimate", model("none")]);
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toMatch(/does not exist\n$/);
  });
});

describe("the tables of docs/jetson.md are what estimate computes", () => {
  const cells = (start: string): string[] => {
    const row = DOCS.split("\n").find((line) => line.startsWith(`| ${start} |`));
    if (row === undefined) throw new Error(`docs/jetson.md has no row ${start}`);
    return row
      .split("|")
      .slice(2, -1)
      .map((cell) => cell.trim());
  };

  for (const name of NAMES) {
    it(`models: ${name}`, async () => {
      const total = async (options: object) => formatBytes((await estimateModel(model(name), options)).totalBytes);
      const expected = await Promise.all([
        total({ doubleQuant: true }),
        total({ type: "int8" }),
        total({ type: "bf16" }),
        total({ doubleQuant: true, train: true, optimizer: "adam8bit" }),
      ]);
      expect(cells(name)).toEqual(expected);
    });
  }

  it("boards", () => {
    for (const [name, board] of Object.entries(BOARDS)) {
      const { bytes, totalBytes } = boardMemory(board);
      const assumed = "assumed" in board ? " (assumed)" : "";
      expect(cells(`\`${name}\``).slice(-2)).toEqual([`${formatBytes(totalBytes)}${assumed}`, formatBytes(bytes)]);
    }
    expect(DOCS).toContain(`less ${formatBytes(SYSTEM_BYTES)}`);
  });
});
