/**
 * Element type conversions. Into f16 and bf16: nearest even, overflow to infinity. Into integers: truncated and
 * saturated, NaN gives 0; between integers: saturated. Between integers and halves by way of f32.
 */
import { BF16, F16, F32, I8, I32, U8 } from "./generated/constants";
import { Convert } from "./generated/operands";
import { bf16, f16, isIntegral, load1, load4, loadInt4, store1, store8, storeInt1, storeInt8 } from "./kernel";

/** y[i] = x[i] as dtype `to`. Unit: element. */
export function convert(op: usize, begin: u32, end: u32): void {
  const from = load<u32>(op, Convert.from);
  if (from == F32) convertFrom<f32>(op, begin, end);
  else if (from == F16) convertFrom<f16>(op, begin, end);
  else if (from == BF16) convertFrom<bf16>(op, begin, end);
  else if (from == I8) convertFrom<i8>(op, begin, end);
  else if (from == U8) convertFrom<u8>(op, begin, end);
  else if (from == I32) convertFrom<i32>(op, begin, end);
  else unreachable();
}

function convertFrom<From>(op: usize, begin: u32, end: u32): void {
  const to = load<u32>(op, Convert.to);
  if (to == F32) convertTo<From, f32>(op, begin, end);
  else if (to == F16) convertTo<From, f16>(op, begin, end);
  else if (to == BF16) convertTo<From, bf16>(op, begin, end);
  else if (to == I8) convertTo<From, i8>(op, begin, end);
  else if (to == U8) convertTo<From, u8>(op, begin, end);
  else if (to == I32) convertTo<From, i32>(op, begin, end);
  else unreachable();
}

function convertTo<From, To>(op: usize, begin: u32, end: u32): void {
  const x = load<usize>(op, Convert.x) + begin * sizeof<From>();
  const y = load<usize>(op, Convert.y) + begin * sizeof<To>();
  const n = end - begin;
  if (sizeof<From>() == sizeof<To>() && isSigned<From>() == isSigned<To>() && isFloat<From>() == isFloat<To>()) {
    memory.copy(y, x, n * sizeof<From>());
    return;
  }
  const whole = n & -8;
  for (let i: u32 = 0; i < whole; i += 8) {
    const p = x + i * sizeof<From>();
    const q = y + i * sizeof<To>();
    if (isIntegral<From>() && isIntegral<To>())
      storeInt8<To>(q, loadInt4<From>(p), loadInt4<From>(p + 4 * sizeof<From>()));
    else store8<To>(q, load4<From>(p), load4<From>(p + 4 * sizeof<From>()));
  }
  for (let i = whole; i < n; i++) {
    const p = x + i * sizeof<From>();
    const q = y + i * sizeof<To>();
    if (isIntegral<From>() && isIntegral<To>()) storeInt1<To>(q, <i32>load<From>(p));
    else store1<To>(q, load1<From>(p));
  }
}
