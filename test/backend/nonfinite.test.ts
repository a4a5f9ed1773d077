import { expect, test } from "vitest";
import { withBackend } from "../helpers/backends.js";
import { nonFiniteStory } from "../helpers/nonfinite.js";

test("what is reported of non-finite input, and when", () =>
  withBackend({}, async (backend) => {
    const log = await nonFiniteStory(backend);
    expect(log.slice(0, 42)).toMatchInlineSnapshot(`
      [
        "fp4, several bad blocks: quantize4bit A block 1093",
        "the read after: fine",
        "nf4, the first block: quantize4bit A block 4",
        "the last element: quantize4bit A block 1562",
        "sixty bad blocks: quantize4bit A block 6",
        "8-bit, by table: quantizeBlockwise A block 273",
        "8-bit, exact: quantizeBlockwise A block 17",
        "8-bit, nested: quantizeBlockwise A block 2",
        "4-bit, nested: quantize4bit A block 1093",
        "rows: int8VectorwiseQuant A row 7",
        "one long row: int8VectorwiseQuant A row 0",
        "many short rows: int8VectorwiseQuant A row 14000",
        "f16: fp4: quantize4bit A block 520",
        "f16: 8-bit: quantizeBlockwise A block 65",
        "f16: rows: int8VectorwiseQuant A row 333",
        "bf16: fp4: quantize4bit A block 520",
        "bf16: 8-bit: quantizeBlockwise A block 65",
        "bf16: rows: int8VectorwiseQuant A row 333",
        "rows with a threshold, which infinity is above: int8VectorwiseQuant A row 1",
        "rows with a threshold, NaN: int8VectorwiseQuant A row 700",
        "rows and columns: int8DoubleQuant A row 700",
        "int8 product: matmul8bit A row 700",
        "int8 product with a threshold: matmul8bit A row 1",
        "int8 product of what f16 does not hold: matmul8bit A row 77",
        "and with a threshold: matmul8bit A row 77",
        "int8 product of finite numbers: fine",
        "of two launches the first is reported, though its block is later: quantize4bit A block 1093",
        "and only that one: fine",
        "a read of something else meets it: quantize4bit A block 2",
        "once: fine",
        "synchronize meets it: quantize4bit A block 1093",
        "synchronize again: fine",
        "readSync meets it: quantize4bit A block 1093",
        "readSync again: fine",
        "a read made before the launch is not blamed: fine",
        "the one after is: quantize4bit A block 1093",
        "three reads pending: rejected, fulfilled, fulfilled",
        "allowed: 4-bit: fine",
        "allowed: 8-bit, nested: fine",
        "allowed: rows: fine",
        "allowed: rows with a threshold: fine",
        "forbidden between two that are allowed: quantize4bit A block 2",
      ]
    `);
    // What the 300 rounds give depends on their random numbers: some reads must have met something, and some not.
    const rounds = log.filter((line) => line.startsWith("round"));
    expect(rounds.length).toBe(42);
    expect(rounds.filter((line) => !line.endsWith("fine")).length).toBeGreaterThan(20);
  }));
