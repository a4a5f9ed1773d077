/**
 * Products by cuBLASLt, where the system has it: JetPack, CUDA's toolkit and the CUDA packages of PyPI do. It is looked for when the
 * first product comes, and everything goes on with this package's own kernels when it is missing, turned off, or has no algorithm
 * for a product. Once it is open, its sizes and addresses decide which of the two takes a product. But when the first product finds
 * no memory for the workspace, or the trial fails, our own kernels serve until the process ends: a program's results repeat
 * where the library, the GPU and the memory for its workspace are there again.
 */
import { DTYPE_ID } from "../../core/dtype.js";
import { OutOfMemoryError } from "../../core/errors.js";
import type { Operands } from "../../core/kernels.js";
import { BINDING, BLAS_COMMAND, BLAS_WORDS } from "./addon.js";
import { addressOf, type CudaStorage } from "./arena.js";
import type { CudaDevice } from "./device.js";
import type { CudaStream } from "./stream.js";

/** The kernels that cuBLASLt may take. */
export type Product = "matmul" | "igemm";

/** What turns cuBLASLt off, in HALFBYTE_CUBLASLT. */
const OFF = "off";
/** Major versions that are known, the newest first; one of a newer CUDA than the driver's would not start. */
const MAJORS = [13, 12, 11];
/** Where the loader finds it, or where CUDA's own packages put it without telling the loader. */
const FOLDERS = ["", "/usr/local/cuda/lib64/"];
/** Algorithms that split the sum, or schedule themselves, work here: the sizes that NVIDIA names for Hopper and for all others. */
const WORKSPACE = 32 << 20;
const WORKSPACE_INTEGRATED = 4 << 20;
/** Products of fewer multiplications are left to our own kernels: there the library's choosing costs more than the work. */
export const LEAST_WORK = 32 ** 3;
/** Rows and columns of the product that shows whether the library works. */
const TRIAL = 64;
const MOST = 2 ** 31 - 1;
const TWO_32 = 2 ** 32;
const WORD = BLAS_COMMAND >> 2;

/** Sizes of a product as BLAS_WORDS has them. */
interface Sizes {
  readonly dtype: number;
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly batch: number;
  readonly ldy: number;
  readonly transposeA: number;
  readonly transposeB: number;
  readonly sharedB: number;
}

export interface BlasOptions {
  /** The library, or `false` to go without. Default: HALFBYTE_CUBLASLT, else wherever it is. */
  readonly library: string | false | undefined;
  readonly device: CudaDevice;
  readonly allocate: (bytes: number) => CudaStorage;
  readonly release: (storage: CudaStorage) => void;
}

export class CudaBlas {
  /** `12.6.4 (/usr/lib/aarch64-linux-gnu/libcublasLt.so.12)`, once it is open. */
  private name: string | undefined;
  /** Why there is none, once that is known. */
  private reason: string | undefined;
  /** What the library said when it had no algorithm for a product, the last time. For diagnosis. */
  refusal: string | undefined;
  private workspace: CudaStorage | undefined;
  private readonly words: Uint32Array;

  constructor(
    private readonly stream: CudaStream,
    private readonly options: BlasOptions,
  ) {
    this.words = stream.command.subarray(WORD);
  }

  /** Version and file, or undefined where there is none. Opens the library. */
  get version(): string | undefined {
    this.open();
    return this.name;
  }

  /** Why there is no library, or undefined when there is. Opens it. */
  get missing(): string | undefined {
    this.open();
    return this.reason;
  }

  /** Whether the library is to be asked about a product: there is one, and the product is neither empty, tiny nor too large. */
  serves<K extends Product>(kernel: K, operands: Operands<K>): boolean {
    if (this.reason !== undefined) return false;
    const { m, n, k, batch, ldy } = sizesOf(kernel, operands);
    // A bias is added to whole rows.
    if (ldy !== n && this.wantsSums(kernel, operands)) return false;
    return m * n * k * batch >= LEAST_WORK && Math.max(m * batch, n, k, ldy) <= MOST && this.open();
  }

  /**
   * Whether the library is to give float32 sums, to which the bias is added afterwards: in 16 bits it may round a sum before it adds
   * the bias.
   */
  wantsSums<K extends Product>(kernel: K, operands: Operands<K>): boolean {
    return kernel === "matmul" && (operands as Operands<"matmul">).bias !== null && operands16(operands);
  }

  /**
   * Enqueues a product that `serves` has approved; its operands must lie in the stream's `command` too, for the words of a failure.
   * False when the library has no algorithm for it: nothing was done then. With `wide`, an address, float32 sums without
   * the bias go there instead of to y.
   * @throws CudaError
   */
  launch<K extends Product>(kernel: K, operands: Operands<K>, wide?: number): boolean {
    const { words } = this;
    const { a, b, y } = operands;
    const bias = kernel === "matmul" ? (operands as Operands<"matmul">).bias : null;
    this.set(sizesOf(kernel, operands));
    words[BLAS_WORDS.workspaceBytes] = this.workspace!.bytes;
    this.setWide(BLAS_WORDS.workspace, this.workspace!.address);
    this.setWide(BLAS_WORDS.a, addressOf(a));
    this.setWide(BLAS_WORDS.b, addressOf(b));
    this.setWide(BLAS_WORDS.bias, addressOf(wide === undefined ? bias : null));
    this.setWide(BLAS_WORDS.y, wide ?? addressOf(y));
    words[BLAS_WORDS.wide] = wide === undefined ? 0 : 1;
    if (this.stream.multiply(kernel)) return true;
    this.refusal = this.stream.addon.detail();
    return false;
  }

  /** Nothing is opened any more. The workspace goes with the arena, the library's handle with the context. */
  close(): void {
    this.reason ??= "the backend was closed";
    this.name = undefined;
  }

  private open(): boolean {
    if (this.name === undefined && this.reason === undefined) this.reason = this.start();
    return this.name !== undefined;
  }

  /** Opens the library and tries it. @returns why that did not work */
  private start(): string | undefined {
    const { options } = this;
    const wanted = options.library ?? (process.env.HALFBYTE_CUBLASLT || undefined);
    if (wanted === false || wanted === OFF) return "it is turned off";
    const found = this.find(wanted === undefined ? candidates(options.device.driverVersion) : [wanted]);
    if (found.name === undefined) return found.reason;
    try {
      this.workspace = options.allocate(options.device.integrated ? WORKSPACE_INTEGRATED : WORKSPACE);
    } catch (error) {
      if (error instanceof OutOfMemoryError) return `${found.name}: there is no memory for its workspace`;
      throw error;
    }
    const status = this.tryOut(this.workspace.address);
    if (status !== 0) {
      const words = this.wordsFor(status);
      options.release(this.workspace);
      return `${found.name}: a first small product failed (${words})`;
    }
    this.name = found.name;
    return undefined;
  }

  /** The first of several libraries that opens, or what was wrong with them. */
  private find(paths: readonly string[]): { name: string; reason?: undefined } | { name?: undefined; reason: string } {
    const { addon } = this.stream;
    let reason: string | undefined;
    for (const path of paths) {
      const identity: { file?: string } = {};
      const status = addon.blasOpen(path, identity);
      if (status === 0) return { name: `${[...addon.results.subarray(0, 3)].join(".")} (${identity.file})` };
      const absent = status === BINDING.noLibrary && paths.length > 1;
      if (!absent) reason ??= `${path}: ${this.wordsFor(status)}`;
    }
    return { reason: reason ?? `there is no ${paths[0]}, nor an older one` };
  }

  private wordsFor(status: number): string {
    const { addon } = this.stream;
    const detail = addon.detail();
    const [name, words] = addon.describe(status);
    return `${name}, ${detail || words}`;
  }

  /**
   * One small product within the workspace. A library may open and yet not work on this GPU; and a board's power and clocks rise on
   * something that hardly draws any.
   */
  private tryOut(address: number): number {
    const bytes = 2 * TRIAL * TRIAL;
    this.stream.fill(address, 0, 3 * bytes);
    const [m, n, k] = [TRIAL, TRIAL, TRIAL];
    this.set({ dtype: DTYPE_ID.f16, m, n, k, batch: 1, ldy: n, transposeA: 0, transposeB: 1, sharedB: 0 });
    this.words[BLAS_WORDS.workspaceBytes] = 0;
    this.setWide(BLAS_WORDS.a, address);
    this.setWide(BLAS_WORDS.b, address + bytes);
    this.setWide(BLAS_WORDS.y, address + 2 * bytes);
    this.setWide(BLAS_WORDS.bias, 0);
    this.words[BLAS_WORDS.wide] = 0;
    return this.stream.askBlas();
  }

  private set({ dtype, m, n, k, batch, ldy, transposeA, transposeB, sharedB }: Sizes): void {
    const { words } = this;
    // One b for all matrices of a: they are one matrix of more rows.
    const one = batch === 1 || (sharedB !== 0 && transposeA === 0);
    words[BLAS_WORDS.dtype] = dtype;
    words[BLAS_WORDS.transposeA] = transposeA;
    words[BLAS_WORDS.transposeB] = transposeB;
    words[BLAS_WORDS.m] = one ? m * batch : m;
    words[BLAS_WORDS.n] = n;
    words[BLAS_WORDS.k] = k;
    words[BLAS_WORDS.batch] = one ? 1 : batch;
    words[BLAS_WORDS.lda] = transposeA ? m : k;
    words[BLAS_WORDS.ldb] = transposeB ? k : n;
    words[BLAS_WORDS.ldy] = ldy;
    this.setWide(BLAS_WORDS.strideA, m * k);
    this.setWide(BLAS_WORDS.strideB, sharedB ? 0 : k * n);
    this.setWide(BLAS_WORDS.strideY, m * ldy);
  }

  private setWide(at: number, value: number): void {
    this.words[at] = value;
    this.words[at + 1] = value / TWO_32;
  }
}

function operands16(operands: object): boolean {
  return "dtype" in operands && operands.dtype !== DTYPE_ID.f32;
}

function sizesOf<K extends Product>(kernel: K, operands: Operands<K>): Sizes {
  if (kernel === "matmul") return operands as Operands<"matmul">;
  const { m, n, k, batch } = operands as Operands<"igemm">;
  return { dtype: DTYPE_ID.i8, m, n, k, batch, ldy: n, transposeA: 0, transposeB: 1, sharedB: 0 };
}

/** Names of the library, the best first. */
function candidates(driverVersion: number): string[] {
  const majors = MAJORS.filter((major) => major <= driverVersion / 1000);
  const names = [...majors.map((major) => `libcublasLt.so.${major}`), "libcublasLt.so"];
  return FOLDERS.flatMap((folder) => names.map((name) => folder + name));
}
