/** `--device` and HALFBYTE_DEVICE on the commands that compute. */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { cudaMissing } from "#halfbyte/backend/devices.js";
import { makeTinyModel } from "../../scripts/make-tiny-model.mjs";
import { temporaryFolder } from "../helpers/checkpoint.js";
import { contents, halfbyte, listing, parseOnly } from "../helpers/cli.js";
import { cudaScene, NO_SCENE, type Scene } from "../helpers/cuda-scene.js";

const folder = temporaryFolder();
const tiny = folder.file("tiny");
let scene: Scene;
beforeAll(async () => {
  await makeTinyModel(tiny);
  if (NO_SCENE === "") scene = cudaScene(folder.path);
});
afterAll(() => folder.remove());

let count = 0;
const fresh = (): string => folder.file(`out${count++}`);
/** A library that loads and is no driver. */
const NO_DRIVER = { HALFBYTE_CUDA_LIBRARY: "libc.so.6" };

const commands = (out: string): [name: string, words: string[]][] => [
  ["quantize", ["quantize", tiny, out]],
  ["compare", ["compare", tiny, tiny]],
  ["golden check", ["golden", "check", "test/golden/data"]],
];

describe("--device", () => {
  for (const [name, words] of commands("unused")) {
    test(`${name}: help names it, and a device that does not exist is a usage error`, async () => {
      const help = await halfbyte([...words.filter((word) => /^[a-z]+$/.test(word)), "--help"]);
      expect(help.stdout).toMatch(/--device <DEVICE>\s+where to compute .*"auto",\s+"cpu",\s+"cuda"/s);
      const { code, stderr } = await halfbyte([...words, "--device", "gpu"]);
      expect(code).toBe(2);
      expect(stderr).toMatch(/'gpu' is invalid\. Allowed choices are auto, cpu, cuda/);
    });
  }

  for (const device of ["option", "environment"]) {
    test(`cuda by ${device} fails with the reason, and leaves nothing`, async () => {
      const out = fresh();
      for (const [, words] of commands(out)) {
        const option = device === "option" ? ["--device", "cuda"] : [];
        const env = device === "option" ? NO_DRIVER : { ...NO_DRIVER, HALFBYTE_DEVICE: "cuda" };
        const { code, stdout, stderr } = await halfbyte([...words, ...option, "--json"], { env });
        expect({ code, stderr }).toEqual({ code: 1, stderr: "" });
        expect(parseOnly(stdout)).toMatchObject({ error: { code: "ERR_HALFBYTE_CUDA_UNAVAILABLE" } });
      }
      expect(listing(out)).toEqual([]);
    });
  }

  test("the option wins over HALFBYTE_DEVICE; a bad value there is named", async () => {
    const out = fresh();
    const env = { ...NO_DRIVER, HALFBYTE_DEVICE: "cuda" };
    const { code, stdout, stderr } = await halfbyte(["quantize", tiny, out, "--device", "cpu", "--json"], { env });
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    expect(parseOnly(stdout)).toMatchObject({ device: "cpu" });
    const bad = await halfbyte(["quantize", tiny, fresh()], { env: { HALFBYTE_DEVICE: "orin" } });
    expect(bad.code).toBe(1);
    expect(bad.stderr).toMatch(/^halfbyte: \[init\] HALFBYTE_DEVICE: expected auto, cpu or cuda, received orin\n$/);
  });

  test("auto falls back to the same bytes, with one warning on stderr and none in the JSON", async () => {
    const [plain, fallen] = [fresh(), fresh()];
    await halfbyte(["quantize", tiny, plain, "--device", "cpu"]);
    const env = { ...NO_DRIVER, HALFBYTE_DEVICE: "auto" };
    const { code, stdout, stderr } = await halfbyte(["quantize", tiny, fallen, "--json"], { env });
    expect(code).toBe(0);
    expect(parseOnly(stdout)).toMatchObject({ device: "cpu" });
    expect(stderr.match(/\[HALFBYTE_CUDA_FALLBACK\]/g)).toHaveLength(1);
    expect(contents(fallen)).toEqual(contents(plain));
  });
});

describe.skipIf(NO_SCENE)(`on the fake driver${NO_SCENE}`, () => {
  test("quantize and compare compute there, and say so", async () => {
    scene.rememberSuccess();
    const out = fresh();
    for (const double of [[], ["--double-quant"]]) {
      const { code, stdout, stderr } = await halfbyte(
        ["quantize", tiny, out, "--force", "--device", "cuda", ...double],
        {
          env: scene.env,
        },
      );
      expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
      expect(stdout).toMatch(/^took .* of memory at most, on cuda$/m);
    }
    const compared = await halfbyte(["compare", tiny, out, "--device", "cuda", "--json"], { env: scene.env });
    expect(compared).toMatchObject({ code: 0, stderr: "" });
    // Its kernels do nothing, so these are no numbers of a cpu.
    expect(parseOnly(compared.stdout).total).not.toEqual(
      parseOnly((await halfbyte(["compare", tiny, out, "--device", "cpu", "--json"])).stdout).total,
    );
  });

  test("a GPU that fails half way leaves nothing", async () => {
    scene.rememberSuccess();
    const out = fresh();
    const env = { ...scene.env, HALFBYTE_FAKE_CUDA_FAULT_AT: "9" };
    const { code, stderr } = await halfbyte(["quantize", tiny, out, "--device", "cuda"], { env });
    expect(code).toBe(1);
    expect(stderr).toMatch(/^halfbyte: \[cuda\] .*CUDA_ERROR_ILLEGAL_ADDRESS \(700\)[^\n]*\n$/);
    expect(listing(out)).toEqual([]);
    expect(listing(folder.path).filter((name) => name.startsWith("."))).toEqual([]);
  });
});

const missing = cudaMissing();
test.skipIf(missing)(`a GPU gives the cpu's bytes${missing ? ` (skipped: ${missing})` : ""}`, async () => {
  for (const options of [["--double-quant"], ["--type", "fp4"], ["--type", "int8"], ["--compute-dtype", "float32"]]) {
    const made = await Promise.all(
      ["cpu", "cuda"].map(async (device) => {
        const out = fresh();
        const { code, stdout, stderr } = await halfbyte([
          "quantize",
          tiny,
          out,
          "--device",
          device,
          "--json",
          ...options,
        ]);
        expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
        expect(parseOnly(stdout)).toMatchObject({ device });
        return contents(out);
      }),
    );
    expect(made[1]).toEqual(made[0]);
  }
});
