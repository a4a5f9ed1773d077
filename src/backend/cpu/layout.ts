/**
 * The fixed part of the cpu backend's shared memory, in bytes: control words, the command ring, then the WebAssembly
 * module's constants, then the arena. asm/ gets these numbers generated. Words that different threads write lie on
 * cache lines of their own (128 bytes: two lines, because prefetchers fetch pairs).
 */

export const LINE = 128;

/** Number of commands enqueued so far (u32, wraps). Written by the main thread only. */
export const HEAD = 1024;
/** Every command below this number is complete. */
export const LOW = HEAD + LINE;
/** Workers asleep on HEAD. */
export const PARKED = LOW + LINE;
/** Workers asleep on LOW. */
export const LOW_WAITERS = PARKED + LINE;
/** Number of the last fence that ran; readers sleep on it. */
export const FENCE = LOW_WAITERS + LINE;
/** Non-zero: the stream has failed, everybody leaves. */
export const ABORT = FENCE + LINE;
/** Workers that have arrived in the starting task. */
export const ARRIVED = ABORT + LINE;
/** Commands that have met a fault so far (u32, wraps). */
export const FAULTS = ARRIVED + LINE;
/** Taken by the first worker that fails; only it writes the words at ERROR and then sets ABORT. */
export const ERROR_CLAIM = FAULTS + LINE;
/** The failed worker's words: command, message length, then UTF-8 text. */
export const ERROR = ERROR_CLAIM + LINE;
export const ERROR_TEXT = ERROR + 8;
export const ERROR_TEXT_BYTES = 1024;

/** One line per worker: the command it may be looking at, then a flag that it is parked. The last slot is the main thread's. */
export const PROGRESS = 4096;
export const MAX_THREADS = 64;
export const MAIN_SLOT = MAX_THREADS;

/** The ring: RING_SLOTS records of RECORD_BYTES. A record's words, then the operand struct. */
export const RING = 16384;
export const RING_SLOTS = 4096;
export const RECORD_BYTES = 128;
export const RECORD_KERNEL = 0;
export const RECORD_PARTS = 4;
export const RECORD_UNITS = 8;
export const RECORD_PER = 12;
export const RECORD_CONTEXT = 16;
export const RECORD_KERNEL_ID = 20;
export const RECORD_CLAIMED = 24;
export const RECORD_FINISHED = 28;
/** Smallest index that a part reported by `fault`; NO_FAULT when none did. */
export const RECORD_FAULT = 32;
/** Pages of the memory when the command was enqueued. */
export const RECORD_PAGES = 36;
export const RECORD_OPERANDS = 40;
export const NO_FAULT = 0xffffffff;

/** Where the module's constants start; its own __heap_base says where they end. */
export const ASM_MEMORY_BASE = 655360;

/**
 * Memory that a thread has to itself while it runs a part; it lies between the constants and the arena. A page of it that no
 * kernel touches costs nothing.
 */
export const SCRATCH_BYTES = 524288;

/** A unit of the 4-bit products: this many columns of the output by at most this many rows of it. */
export const PRODUCT_COLUMNS = 32;
export const PRODUCT_ROWS = 64;
/** The columns of a unit of the transposed product. */
export const TRANSPOSED_COLUMNS = 128;

/** Busy looks at a word before a worker goes to sleep on it. */
export const SPINS = 2000;

export const PAGE_BYTES = 65536;
/** A wasm32 memory ends here. */
export const MAX_PAGES = 65536;

/** Tiles that are units of the other products: rows of a, columns of y. */
export const IGEMM_ROWS = 64;
export const IGEMM_PANEL = 8;
export const TRANSPOSE_TILE = 64;
export const DEQUANT_TILE = 64;
export const SPMM_WIDTH = 256;
export const MATMUL_ROWS = 64;
export const MATMUL_PANEL = 8;
/** Columns that a dense product takes together where a part has them; with a b of k x n and at most 16 rows, and at most 2. */
export const MATMUL_WIDTH = 64;
export const MATMUL_WIDE = 256;
export const MATMUL_WIDEST = 1024;
