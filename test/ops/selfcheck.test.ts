/** The check behind `halfbyte doctor` and the cuda probe: right numbers pass, a single wrong byte anywhere does not. */
import { describe, expect, test } from "vitest";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { liveTensors } from "#halfbyte/core/tensor.js";
import { hardBlocks, SELF_CHECK_ELEMENTS, selfCheck } from "#halfbyte/ops/selfcheck.js";
import { NF4_THRESHOLDS } from "#halfbyte/quant/codebooks.js";

/** Flips the lowest bit of one byte of the read with this number. */
class Faulty extends CpuBackend {
  private count = 0;
  constructor(
    private readonly wrong: number,
    private readonly at: number,
  ) {
    super({ threads: 1 });
  }
  override async read(...args: Parameters<CpuBackend["read"]>): Promise<Uint8Array<ArrayBuffer>> {
    const mine = this.count++ === this.wrong;
    const bytes = await super.read(...args);
    if (mine) bytes[this.at < 0 ? bytes.length - 1 : this.at]! ^= 1;
    return bytes;
  }
}

describe("selfCheck", () => {
  test("finds the cpu right, at awkward lengths", async () => {
    const backend = new CpuBackend({ threads: 2, guards: true });
    try {
      for (const elements of [1, 2, 63, 65, 4133, 70_001]) {
        expect(await selfCheck(backend, elements)).toMatchObject({ elements, wrong: undefined });
      }
      expect(await selfCheck(backend)).toMatchObject({ elements: SELF_CHECK_ELEMENTS, wrong: undefined });
      expect(liveTensors(backend)).toBe(0);
    } finally {
      await backend.close();
    }
  });

  const results = [
    "codes",
    "scales",
    "values",
    "codes with double quantization",
    "codes of scales",
    "offset of scales",
    "scales of scales",
    "values with double quantization",
  ];
  for (const [read, what] of results.entries()) {
    test(`sees a wrong byte in the ${what}`, async () => {
      for (const at of [0, -1]) {
        const backend = new Faulty(read, at);
        try {
          const { wrong } = await selfCheck(backend, 4133);
          expect(wrong).toMatch(
            new RegExp(`^${what} differ from plain JavaScript, first at byte ${at === 0 ? "0" : "\\d+"}$`),
          );
        } finally {
          await backend.close();
        }
      }
    });
  }
});

test("the hard blocks' codes show a reciprocal that is off by its last bit", () => {
  const x = hardBlocks();
  const blocks = x.length / 64;
  expect(blocks).toBe(32);
  const word = new Float32Array(1);
  const bits = new Int32Array(word.buffer);
  const codes = (block: Float32Array, r: number): string =>
    block.map((v) => NF4_THRESHOLDS.filter((t) => Math.fround(v * r) > t).length).join(" ");
  for (let k = 0; k < blocks; k++) {
    const block = x.subarray(64 * k, 64 * (k + 1));
    expect(block.every((v) => Math.abs(v) <= block[0]!)).toBe(true);
    const right = codes(block, Math.fround(1 / block[0]!));
    for (const off of [-1, 1]) {
      word[0] = 1 / block[0]!;
      bits[0]! += off;
      expect(codes(block, word[0]), `mantissa ${block[0]}, ${off}`).not.toBe(right);
    }
  }
});
