/** Codebooks on a device: the values and search tables that kernels get as constants. */
import type { Backend } from "#halfbyte/core/backend.js";
import type { Address } from "#halfbyte/core/kernels.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { bytesOf } from "#halfbyte/core/typedarray.js";
import type { PrimitiveName } from "#halfbyte/ops/registry.js";
import { Codebook } from "#halfbyte/quant/codebook.js";
import {
  createDynamicMap,
  createFp8Map,
  createLinearMap,
  createNormalMap,
  get4bitType,
} from "#halfbyte/quant/codebooks.js";
import { buildSearchTable } from "#halfbyte/quant/search-table.js";
import { type Case, caseId, type Host } from "./case.js";

const MAPS: readonly (readonly [PrimitiveName, string, () => Float32Array<ArrayBuffer>])[] = [
  ["createDynamicMap", "signed", () => createDynamicMap()],
  ["createDynamicMap", "unsigned", () => createDynamicMap(false)],
  ["createLinearMap", "signed", () => createLinearMap()],
  ["createLinearMap", "unsigned", () => createLinearMap(false)],
  ["createFp8Map", "5-2", () => createFp8Map(true, 5, 2)],
  ["createFp8Map", "4-3", () => createFp8Map()],
  ["createNormalMap", "default", () => createNormalMap()],
  ["get4bitType", "nf4", () => get4bitType("nf4")],
  ["get4bitType", "fp4", () => get4bitType("fp4")],
];

const f32 = (values: Float32Array): Host => ({ dtype: "f32", shape: [values.length], values });
const u8 = (values: Uint8Array): Host => ({ dtype: "u8", shape: [values.length], values });

function copied<D extends "f32" | "u8">(backend: Backend, src: Address, dtype: D, n: number): Tensor<D> {
  const dst = Tensor.allocate(backend, dtype, [n]);
  backend.launch("copy", { src, dst, bytes: dst.byteLength });
  return dst;
}

export function* codebookCases(): Generator<Case> {
  for (const [primitive, name, create] of MAPS) {
    yield {
      id: caseId(primitive, name),
      primitive,
      dtype: "f32",
      inputs: () => ({ uploaded: f32(create()) }),
      run: ({ uploaded }, backend) => {
        const values = create();
        if (values.length !== 256) return { uploaded: uploaded!.clone() };
        const codebook = Codebook.of(primitive, values);
        const table = codebook.tableOn(backend);
        return {
          uploaded: uploaded!.clone(),
          constant: copied(backend, codebook.on(backend), "f32", 256),
          ...(table && { table: copied(backend, table, "u8", buildSearchTable(values)!.length) }),
        };
      },
      expected: () => {
        const values = create();
        const table = values.length === 256 && buildSearchTable(values);
        return {
          uploaded: f32(values),
          ...(values.length === 256 && { constant: f32(values) }),
          ...(table && { table: u8(bytesOf(table)) }),
        };
      },
    };
  }
}
