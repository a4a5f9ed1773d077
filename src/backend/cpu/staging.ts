/**
 * Memory for small writes whose destination is still in use: the host puts the bytes here and the stream copies them from here. A ring, so
 * that a host that is far ahead of the stream writes on without waiting for it.
 */
import type { Address } from "../../core/kernels.js";
import type { CpuStorage } from "./arena.js";

const RING_BYTES = 1 << 20;
/** Larger writes have memory of their own. */
const MOST_BYTES = RING_BYTES / 4;
/** Pieces start on cache lines of their own. */
const LINE = 64;

/** A piece in use: bytes of the ring, until the command `lastUse` is over. */
interface Piece {
  readonly bytes: number;
  lastUse: number;
}

export class StagingRing {
  private storage: CpuStorage | undefined;
  /** The oldest first. */
  private readonly pieces: Piece[] = [];
  private used = 0;
  private at = 0;

  constructor(private readonly reserve: (bytes: number) => CpuStorage) {}

  /**
   * A place for bytes that a command will copy away: say which with `use`.
   * @param low commands below this number are complete
   * @returns undefined where there is none
   */
  take(bytes: number, low: number): Address | undefined {
    if (bytes > MOST_BYTES) return undefined;
    const storage = this.memory(low);
    if (!storage) return undefined;
    const { pieces } = this;
    while (pieces.length > 0 && pieces[0]!.lastUse <= low) this.used -= pieces.shift()!.bytes;
    const need = Math.ceil(bytes / LINE) * LINE;
    // What is left before the end is passed over.
    const rest = this.at + need > RING_BYTES ? RING_BYTES - this.at : 0;
    if (this.used + rest + need > RING_BYTES) return undefined;
    const byteOffset = rest > 0 ? 0 : this.at;
    pieces.push({ bytes: rest + need, lastUse: Number.POSITIVE_INFINITY });
    this.used += rest + need;
    this.at = byteOffset + need;
    return { storage, byteOffset };
  }

  /** The command that copies what was put where the last `take` said. */
  use(command: number): void {
    this.pieces.at(-1)!.lastUse = command;
  }

  private memory(low: number): CpuStorage | undefined {
    if (this.storage) return this.storage;
    try {
      const storage = this.reserve(RING_BYTES);
      // Whoever had it before may still use it.
      if (storage.lastUse > low) this.pieces.push({ bytes: RING_BYTES, lastUse: storage.lastUse });
      this.used = this.pieces.length > 0 ? RING_BYTES : 0;
      this.storage = storage;
      return storage;
    } catch {
      // No room for a ring: a write has to be happy with what it takes itself.
      return undefined;
    }
  }
}
