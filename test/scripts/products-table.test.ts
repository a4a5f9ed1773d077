/** docs/products.md has the paths that the code chooses. */
import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { MOST_PLAIN_ROWS, MOST_TILE_ROWS, MOST_VECTOR_ROWS, productPath } from "#halfbyte/core/product-paths.js";
import { DOCS, pathTable, WEIGHTS, withTable } from "../../scripts/products-table.mjs";

describe("the table of paths", () => {
  test("is up to date in docs/products.md", () => {
    const text = readFileSync(DOCS, "utf8");
    expect(text, "npm run support").toBe(withTable(text));
  });

  test("says for every number of rows what productPath says", () => {
    const rows = pathTable()
      .split("\n\n")[0]!
      .split("\n")
      .slice(2)
      .map((line) => line.slice(2, -2).split(" | "));
    const limits = [MOST_VECTOR_ROWS / 2, MOST_VECTOR_ROWS, MOST_PLAIN_ROWS, MOST_TILE_ROWS];
    const asked = [1, ...limits.flatMap((limit) => [limit, limit + 1]), 4096];
    let questions = 0;
    for (const device of ["cpu", "cuda"] as const) {
      for (const mode of ["exact", "fast"] as const) {
        for (const dtype of ["f32", "f16", "bf16"] as const) {
          for (const { name, shapes } of WEIGHTS) {
            for (const m of asked) {
              const found = rows.filter(
                ([where, modes, dtypes, weights, range]) =>
                  where === device &&
                  modes!.split(", ").includes(mode) &&
                  dtypes!.split(" ").includes(dtype) &&
                  (weights === "any" || weights!.split("; ").includes(name)) &&
                  holds(range!, m),
              );
              for (const shape of shapes) {
                const path = productPath(device, { ...shape, m, dtype }, mode);
                expect(
                  found.map(([, , , , , written]) => written),
                  `${device} ${mode} ${dtype} ${name} ${m}`,
                ).toEqual([path]);
                questions++;
              }
            }
          }
        }
      }
    }
    expect(questions).toBeGreaterThan(1000);
  });

  test("refuses a text without its marks", () => {
    expect(() => withTable("# Products\n")).toThrow(/no <!-- table: paths -->/);
  });
});

function holds(range: string, count: number): boolean {
  if (range === "any") return true;
  const [first, last] = range.replace(" and more", " to Infinity").split(" to ").map(Number);
  return first! <= count && count <= (last ?? first!);
}
