/** Making tensors from host data. */
import { type DeviceChoice, getBackend } from "../backend/devices.js";
import { DTYPES, type DType, isDType } from "../core/dtype.js";
import { DTypeError, ShapeError } from "../core/errors.js";
import { formatShape, type Shape, sizeOf } from "../core/shape.js";
import { checkShape, Tensor } from "../core/tensor.js";
import { describeArray, naturalDType, type TensorLike } from "../core/typedarray.js";

export interface TensorOptions<D extends DType> {
  /** Default: what the array holds (numbers: f32). A Uint16Array needs it: f16 or bf16 bit patterns. */
  readonly dtype?: D;
  /** Default: one dimension. */
  readonly shape?: Shape;
  /** Default: that of the last `init`, else HALFBYTE_DEVICE, else `auto`: cuda where it works, else cpu. */
  readonly device?: DeviceChoice | undefined;
}

/**
 * A tensor with a copy of `data`. Numbers are rounded to f16 or bf16, nearest even.
 * @throws DTypeError, ShapeError, ArgumentError, DeviceError, OutOfMemoryError
 */
export function tensor<D extends DType = "f32">(data: TensorLike, options: TensorOptions<D> = {}): Tensor<D> {
  const dtype = options.dtype ?? (naturalDType(data) as D | undefined);
  if (dtype === undefined) throw new DTypeError("tensor", "dtype", "f16 or bf16 for this array", describeArray(data));
  const shape = options.shape ?? [data.length];
  checkShape("tensor", shape);
  if (sizeOf(shape) !== data.length) {
    throw new ShapeError("tensor", "shape", `${data.length} elements as in data`, formatShape(shape));
  }
  const result = empty(shape, { ...options, dtype });
  try {
    return result.copyFrom(data);
  } catch (error) {
    result.dispose();
    throw error;
  }
}

/** A tensor with undefined contents. Default dtype f32. @throws as `tensor` */
export function empty<D extends DType = "f32">(shape: Shape, options: Omit<TensorOptions<D>, "shape"> = {}): Tensor<D> {
  const dtype = options.dtype ?? ("f32" as D);
  if (!isDType(dtype)) throw new DTypeError("empty", "dtype", DTYPES.join(", "), String(dtype));
  checkShape("empty", shape);
  return Tensor.allocate(getBackend(options.device), dtype, shape);
}

/** A tensor of zeros. Default dtype f32. @throws as `tensor` */
export function zeros<D extends DType = "f32">(shape: Shape, options: Omit<TensorOptions<D>, "shape"> = {}): Tensor<D> {
  const result = empty(shape, options);
  result.backend.launch("fill", { dst: result, bytes: result.byteLength, value: 0 });
  return result;
}

/** A tensor from elements' bytes (little-endian), as files hold them. @throws as `tensor` */
export function fromBytes<D extends DType>(
  bytes: Uint8Array,
  options: TensorOptions<D> & { readonly dtype: D; readonly shape: Shape },
): Tensor<D> {
  const result = empty(options.shape, options);
  if (bytes.byteLength !== result.byteLength) {
    const { byteLength } = result;
    result.dispose();
    const expected = `${byteLength} bytes for ${options.dtype} ${formatShape(options.shape)}`;
    throw new ShapeError("fromBytes", "bytes", expected, `${bytes.byteLength}`);
  }
  result.backend.write(result.storage, result.byteOffset, bytes);
  return result;
}
