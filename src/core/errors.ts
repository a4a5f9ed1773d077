/**
 * Every error that halfbyte throws on purpose. Each carries a stable `code`; operand errors say which operand of which
 * operation was wrong, what was expected and what came.
 */

/** Base class: `catch (e) { if (e instanceof HalfbyteError) ... }`. */
export abstract class HalfbyteError extends Error {
  /** A stable identifier for programs, `ERR_HALFBYTE_...`. */
  abstract readonly code: string;
  override get name(): string {
    return this.constructor.name;
  }
}

/** An operand or option of an operation is wrong. Nothing was launched or written. */
export class ArgumentError extends HalfbyteError {
  readonly code: string = "ERR_HALFBYTE_ARGUMENT";
  /**
   * @param op the operation, as the caller knows it (`quantize4bit`)
   * @param operand the operand or option (`blocksize`)
   */
  constructor(
    readonly op: string,
    readonly operand: string,
    readonly expected: string,
    readonly received: string,
  ) {
    super(`[${op}] ${operand}: expected ${expected}, received ${received}`);
  }
}

/** A shape does not fit. */
export class ShapeError extends ArgumentError {
  override readonly code = "ERR_HALFBYTE_SHAPE";
}

/** A dtype does not fit. */
export class DTypeError extends ArgumentError {
  override readonly code = "ERR_HALFBYTE_DTYPE";
}

/** Operands live on different devices, or a device is unknown or not available. */
export class DeviceError extends ArgumentError {
  override readonly code: string = "ERR_HALFBYTE_DEVICE";
}

/** Why the cuda backend cannot be used. */
export type CudaUnavailableCause =
  | "platform"
  | "addon-missing"
  | "worker-thread"
  | "no-driver"
  | "driver-too-old"
  | "no-device"
  | "no-kernel-image"
  | "probe-crashed"
  | "probe-timeout"
  | "probe-mismatch"
  | "driver-error";

/** The cuda backend cannot be used here; `reason` says why, `advice` what to do. */
export class CudaUnavailableError extends DeviceError {
  override readonly code: string = "ERR_HALFBYTE_CUDA_UNAVAILABLE";
  constructor(
    readonly reason: CudaUnavailableCause,
    /** What was found. */
    readonly detail: string,
    /** One sentence. */
    readonly advice: string,
    op = "device",
  ) {
    super(op, "device", "a device that is available (cpu)", `cuda: ${detail}. ${advice}`);
  }
}

/** The package has no code for this GPU. */
export class NoKernelImageError extends CudaUnavailableError {
  override readonly code = "ERR_HALFBYTE_NO_KERNEL_IMAGE";
  constructor(
    /** The GPU's architecture, as `sm_87`. */
    readonly architecture: string,
    /** What the package has code for, as `sm_87`, `compute_80 (PTX)`. */
    readonly available: readonly string[],
    advice: string,
  ) {
    super("no-kernel-image", `no kernels for ${architecture} (there are: ${available.join(", ") || "none"})`, advice);
  }
}

/** A tensor or backend was used after it was disposed. */
export class DisposedError extends HalfbyteError {
  readonly code = "ERR_HALFBYTE_DISPOSED";
  constructor(what: string, op: string) {
    super(`[${op}] ${what}: used after dispose()`);
  }
}

/** Memory of a device is exhausted. The failed call allocated nothing; smaller ones still work. */
export class OutOfMemoryError extends HalfbyteError {
  readonly code = "ERR_HALFBYTE_OUT_OF_MEMORY";
  constructor(
    readonly device: string,
    readonly requestedBytes: number,
    readonly freeBytes: number,
    readonly limitBytes: number,
    /** What else helps. */
    advice = "raise memoryLimit",
  ) {
    super(
      `[${device}] out of memory: ${requestedBytes} bytes requested, ${freeBytes} of ${limitBytes} bytes free. ` +
        "Dispose tensors you no longer need (dispose(), using, or tidy() round a loop's body; the garbage collector " +
        `cannot help inside synchronous code), or ${advice}.`,
    );
  }
}

function nonFiniteAdvice(op: string, unit: "block" | "row" | "parameter"): string {
  if (unit !== "parameter") return "Pass allowNonFinite: true to quantize it as bitsandbytes does.";
  if (op === "clipGradNorm")
    return "All gradients keep their values. Without errorIfNonfinite they are scaled all the same, as torch does.";
  return (
    "An optimizer's step then writes nothing. With skipNonFinite: true an optimizer counts such steps and goes on, as a GradScaler " +
    "does; with allowNonFinite: true it does not check, like bitsandbytes."
  );
}

/** A quantizer met NaN or infinity, or an optimizer a gradient that holds some. Reported by the first read after the launch. */
export class NonFiniteError extends HalfbyteError {
  readonly code = "ERR_HALFBYTE_NON_FINITE";
  constructor(
    readonly op: string,
    readonly operand: string,
    /** Index of the first block (row, parameter) that holds a non-finite value. */
    readonly index: number,
    readonly unit: "block" | "row" | "parameter" = "block",
  ) {
    super(
      `[${op}] ${operand}: expected finite values, received NaN or infinity in ${unit} ${index}. ${nonFiniteAdvice(op, unit)}`,
    );
  }
}

/** A backend failed while it ran a kernel (trap, lost worker, device error). It stays failed until it is restarted. */
export class BackendError extends HalfbyteError {
  readonly code: string = "ERR_HALFBYTE_BACKEND";
  constructor(
    readonly device: string,
    readonly reason: string,
    /** The kernel that was running with its operands, as far as known. */
    readonly kernel?: string,
    options?: ErrorOptions,
  ) {
    super(`[${device}] ${reason}${kernel ? ` in ${kernel}` : ""}`, options);
  }
}

/** A call of the CUDA driver failed. */
export class CudaError extends BackendError {
  override readonly code = "ERR_HALFBYTE_CUDA";
  constructor(
    /** The binding's function (`moduleLoad`). */
    readonly call: string,
    /** The driver's CUresult, or a negative number of the binding. */
    readonly status: number,
    /** As `CUDA_ERROR_ILLEGAL_ADDRESS`. */
    readonly statusName: string,
    words: string,
    kernel?: string,
  ) {
    super("cuda", `${call}: ${statusName} (${status}), ${words}`, kernel);
  }
}

/** A backend has no implementation of a primitive, dtype or option, and says why. */
export class UnsupportedError extends HalfbyteError {
  readonly code = "ERR_HALFBYTE_UNSUPPORTED";
  constructor(
    readonly what: string,
    readonly why: string,
  ) {
    super(`${what} is not supported: ${why}`);
  }
}

/** A file or serialized state is malformed, truncated, inconsistent or of a kind that cannot be read. */
export class FormatError extends HalfbyteError {
  readonly code = "ERR_HALFBYTE_FORMAT";
  constructor(
    /** `safetensors`, `gguf`, `quant_state`, `checkpoint`, `config` ... */
    readonly format: string,
    /** File path or tensor name the finding is about. */
    readonly where: string,
    readonly problem: string,
    options?: ErrorOptions,
  ) {
    super(`[${format}] ${where}: ${problem}`, options);
  }
}
