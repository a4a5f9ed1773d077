/** Entry of the WebAssembly module: the stream's loop, and the kernels through their table. */
export { kernelTableIndex } from "./generated/table";

import { fence } from "./stream";

export { drain, run } from "./stream";

/** The fence is no kernel of the registry: it belongs to the stream. */
export function fenceTableIndex(): u32 {
  return fence.index;
}

/** First byte after the module's constants. */
export function heapBase(): usize {
  return __heap_base;
}
