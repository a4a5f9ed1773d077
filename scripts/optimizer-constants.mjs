/** The numbers of src/core/optimizers.ts under the names that asm/ and csrc/ know them by. */
import * as optimizers from "../dist/core/optimizers.js";

const PREFIX = { OPTIMIZER_FAMILY_ID: "FAMILY", LIST_RECORD: "LIST", STEP_SCALARS: "SCALAR", GUARD: "GUARD" };
const capitals = (name) => name.replace(/[A-Z]/g, (letter) => `_${letter}`).toUpperCase();

/** Names and values; of a group of positions each field as GROUP_FIELD. */
export const OPTIMIZER_CONSTANTS = Object.entries(optimizers).flatMap(([name, value]) => {
  if (typeof value === "number") return [[name, value]];
  if (!(name in PREFIX)) return [];
  return Object.entries(value).map(([field, at]) => [`${PREFIX[name]}_${capitals(field)}`, at]);
});

/** Whether a constant is a count, a position or a pattern of bits, and not a float32. */
export const isWord = (value) => Number.isInteger(value) && value < 2 ** 32;
