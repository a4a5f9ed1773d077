/** Bulk memory. Unit: byte. */
import { Copy, Fill } from "./generated/operands";

/** dst[0..bytes) = src[0..bytes) */
export function copy(op: usize, begin: u32, end: u32): void {
  memory.copy(load<usize>(op, Copy.dst) + begin, load<usize>(op, Copy.src) + begin, end - begin);
}

/** dst[0..bytes) = the four bytes of `value`, repeated. `begin` is a multiple of 4. */
export function fill(op: usize, begin: u32, end: u32): void {
  const dst = load<usize>(op, Fill.dst);
  let value = load<u32>(op, Fill.value);
  if (value == rotl<u32>(value, 8)) {
    memory.fill(dst + begin, <u8>value, end - begin);
    return;
  }
  const pattern = i32x4.splat(value);
  let p = dst + begin;
  const last = dst + end;
  for (; p + 16 <= last; p += 16) v128.store(p, pattern);
  for (; p < last; p++) {
    store<u8>(p, value);
    value >>= 8;
    if ((p - dst) % 4 == 3) value = i32x4.extract_lane(pattern, 0);
  }
}
