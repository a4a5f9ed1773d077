/** `halfbyte golden` as users run it: what is on stdout, what the exit status is. */
import { execFile } from "node:child_process";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";
import { bytesOf, loadReal, REAL_DIR, REAL_FILE, serialize, withDir } from "./files.js";

const MAIN = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));

function halfbyte(...args: string[]): Promise<{ status: number; stdout: string; stderr: string }> {
  return new Promise((resolve) => {
    execFile(process.execPath, [MAIN, ...args], (error, stdout, stderr) => {
      resolve({ status: error ? Number(error.code) : 0, stdout, stderr });
    });
  });
}

/** bitsandbytes' vectors with one 4-bit code changed, as a file of two cases. */
async function damaged(): Promise<Buffer> {
  const file = await loadReal();
  const packed = "q4/f32/normal/nf4/64/packed";
  file.cases = [file.cases[0]!, file.cases.find((c) => c.packed === packed)!];
  const bytes = bytesOf(file, packed);
  bytes[10] = bytes[10]! ^ 1;
  return serialize(file);
}

test("check prints a line per op and exits 0", async () => {
  const { status, stdout, stderr } = await halfbyte("golden", "check", REAL_DIR);
  expect(stdout).toMatch(/^codebook +9 passed +0 failed +0 not run +0 ties\nquantize_4bit +144 passed .* 14 ties\n/);
  expect(stdout).toMatch(/passed: 417 passed, 0 failed, 0 not run, 51 ties proved\n$/);
  expect(stderr).toBe("");
  expect(status).toBe(0);
});

test("check --json prints one object and nothing else", async () => {
  const { status, stdout } = await halfbyte("golden", "check", REAL_DIR, "--device", "cpu", "--json");
  expect(stdout.trimEnd().split("\n")).toHaveLength(1);
  expect(JSON.parse(stdout)).toMatchObject({
    ops: { quantize_blockwise: { passed: 171, failed: 0, notRun: 0, ties: 15 } },
    failures: [],
    notRun: [],
  });
  expect(status).toBe(0);
});

test("a mismatch exits 1 and prints a command that runs just that case", async () => {
  await withDir({ [REAL_FILE]: await damaged() }, async (dir) => {
    const all = await halfbyte("golden", "check", dir);
    expect(all.status).toBe(1);
    expect(all.stdout).toMatch(
      /packed \(q4\/f32\/normal\/nf4\/64\/packed\): 1 of 4610 codes differ\n +worst at 21: expected \d+, got \d+/,
    );
    expect(all.stdout).toMatch(/FAILED: 1 passed, 1 failed/);
    const [, command] = /rerun: halfbyte (.*)/.exec(all.stdout)!;
    expect(command).toBe(`golden check ${dir} --case ${REAL_FILE}:1`);
    const again = await halfbyte(...command!.split(" "), "--json");
    expect(again.status).toBe(1);
    const report = JSON.parse(again.stdout);
    expect(Object.keys(report.ops)).toEqual(["quantize_4bit"]);
    expect(report.failures[0]).toMatchObject({ case: 1, field: "packed", worst: { index: 21 } });
    const good = await halfbyte("golden", "check", dir, "--case", `${REAL_FILE}:0`);
    expect(good.status).toBe(0);
  });
});

test("nothing that could be run, no golden files, no such case: never 0", async () => {
  const unknown = await loadReal();
  unknown.cases = [{ op: "frobnicate" }];
  await withDir({ "a.safetensors": serialize(unknown) }, async (dir) => {
    const { status, stdout } = await halfbyte("golden", "check", dir);
    expect(status).toBe(1);
    expect(stdout).toMatch(/not run: frobnicate, 1 case: unknown op/);
    expect(stdout).toMatch(/FAILED: no case was run/);
  });
  await withDir({}, async (dir) => {
    const { status, stdout, stderr } = await halfbyte("golden", "check", dir);
    expect(status).toBe(1);
    expect(stdout).toBe("");
    expect(stderr).toMatch(/no golden files/);
    expect(stderr).not.toMatch(/\n +at /);
  });
  expect((await halfbyte("golden", "check", REAL_DIR, "--case", "blockwise:999")).status).not.toBe(0);
});

test("write makes vectors that check passes; a seed that is none is refused", async () => {
  await withDir({}, async (dir) => {
    const target = join(dir, "new vectors");
    const written = await halfbyte("golden", "write", target, "--seed", "7", "--json");
    expect(written.status).toBe(0);
    expect(JSON.parse(written.stdout)).toMatchObject({ path: join(target, REAL_FILE), cases: 483 });
    expect(await readdir(target)).toEqual([REAL_FILE]);
    const checked = await halfbyte("golden", "check", target, "--json");
    expect(checked.status).toBe(0);
    expect(JSON.parse(checked.stdout).failures).toEqual([]);
    for (const seed of ["-1", "1.5", "x", ""]) {
      const { status, stderr } = await halfbyte("golden", "write", target, "--seed", seed);
      expect(status, seed).toBe(2);
      expect(stderr, seed).not.toBe("");
    }
  });
});
