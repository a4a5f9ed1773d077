import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { halfbyte, parseOnly } from "../helpers/cli.js";

const COMMANDS = ["quantize", "inspect", "compare", "estimate", "golden", "doctor"];

describe("the command line", () => {
  it("--version prints the version of package.json", async () => {
    const { version } = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8"));
    expect(await halfbyte(["--version"])).toEqual({ code: 0, stdout: `${version}\n`, stderr: "" });
  });

  it("--help names every command, and every command has help", async () => {
    const help = await halfbyte(["--help"]);
    expect(help).toMatchObject({ code: 0, stderr: "" });
    for (const command of COMMANDS) {
      expect(help.stdout).toContain(`\n  ${command} `);
      expect(await halfbyte([command, "--help"])).toMatchObject({ code: 0, stderr: "" });
    }
    const { stdout } = await halfbyte(["help", "quantize"]);
    for (const option of [
      "type",
      "blocksize",
      "double-quant",
      "compute-dtype",
      "skip",
      "threads",
      "max-shard-size",
      "force",
      "json",
    ]) {
      expect(stdout).toContain(`--${option}`);
    }
  });

  it("without a command shows the help on stderr", async () => {
    const { code, stdout, stderr } = await halfbyte([]);
    expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
    expect(stderr).toContain("Usage: halfbyte");
  });

  const wrong: [words: string[], message: RegExp][] = [
    [["quantise"], /^halfbyte: unknown command 'quantise' \(Did you mean quantize\?\)\n$/],
    [["inspekt", "x"], /Did you mean inspect\?/],
    [["quantize", "a", "b", "--typ", "nf4"], /^halfbyte: unknown option '--typ' \(Did you mean --type\?\)\n$/],
    [["quantize", "a", "b", "--double-quants"], /Did you mean --double-quant\?/],
    [["doctor", "--jsn"], /Did you mean --json\?/],
    [["golden", "chek", "x"], /Did you mean check\?/],
    [["quantize", "a"], /missing required argument 'OUT'/],
    [["quantize", "a", "b", "c"], /too many arguments/],
    [["quantize", "a", "b", "--type", "nf5"], /'nf5' is invalid\. Allowed choices are nf4, fp4, int8/],
    [["quantize", "a", "b", "--blocksize", "65"], /'65' is invalid\. Allowed choices are 32, 64, .* 4096/],
    [["quantize", "a", "b", "--compute-dtype", "bf16"], /Allowed choices are float32, float16, bfloat16/],
    [["quantize", "a", "b", "--threads", "0"], /a whole number from 1 to 64/],
    [["compare", "a", "b", "--threads", "many"], /a whole number from 1 to 64/],
    [["quantize", "a", "b", "--max-shard-size", "5 apples"], /a size such as/],
    [["quantize", "a", "b", "--skip", "("], /a module name or regular expression/],
    [["quantize", "a", "b", "--skip", ""], /a module name or regular expression/],
    [["quantize", "a", "b", "--type", "int8", "--blocksize", "64"], /--blocksize is not for --type int8/],
    [["quantize", "a", "b", "--type", "int8", "--double-quant"], /--double-quant is not for --type int8/],
    [["quantize", "a", "b", "--skip"], /argument missing/],
  ];
  for (const [words, message] of wrong) {
    it(`halfbyte ${words.join(" ")}: one line, exit 2`, async () => {
      const { code, stdout, stderr } = await halfbyte(words);
      expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
      expect(stderr).toMatch(message);
      expect(stderr).toMatch(/^halfbyte: [^\n]+\n$/);
    });
  }

  it("says usage errors as JSON too", async () => {
    const { code, stdout, stderr } = await halfbyte(["quantize", "a", "b", "--typ", "nf4", "--json"]);
    expect({ code, stderr }).toEqual({ code: 2, stderr: "" });
    expect(parseOnly(stdout)).toEqual({
      error: { code: "ERR_USAGE", message: "unknown option '--typ' (Did you mean --type?)" },
    });
  });

  it("failures are one line and exit 1, a stack only with HALFBYTE_DEBUG", async () => {
    const plain = await halfbyte(["inspect", "/no/such/model"]);
    expect(plain).toEqual({
      code: 1,
      stdout: "",
      stderr: "halfbyte: [checkpoint] /no/such/model: does not exist\n",
    });
    const { code, stderr } = await halfbyte(["inspect", "/no/such/model"], { env: { HALFBYTE_DEBUG: "1" } });
    expect(code).toBe(1);
    expect(stderr).toMatch(/\n {4}at /);
    for (const command of [
      ["inspect", "x"],
      ["compare", "x", "y"],
      ["quantize", "x", "/no/where"],
    ]) {
      const json = await halfbyte([...command, "--json"]);
      expect(json).toMatchObject({ code: 1, stderr: "" });
      expect(parseOnly(json.stdout)).toEqual({
        error: { code: "ERR_HALFBYTE_FORMAT", message: "[checkpoint] x: does not exist" },
      });
    }
  });

  it("a bad HALFBYTE_THREADS is said", async () => {
    const { code, stdout } = await halfbyte(["doctor", "--json"], { env: { HALFBYTE_THREADS: "none" } });
    expect(code).toBe(1);
    expect(stdout).toContain("HALFBYTE_THREADS");
  });
});
