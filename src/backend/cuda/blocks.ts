/** What the arena of the cuda backend is made of: allocations of the driver, and the blocks that they are cut into. */

/** An allocation of the driver. */
export interface Segment {
  readonly id: number;
  readonly address: number;
  readonly bytes: number;
  readonly small: boolean;
  /** Of managed memory: one block, nothing else is ever cut from it. */
  readonly paged: boolean;
  first: Block;
}

/** A part of a segment, between its neighbours. */
export interface Block {
  readonly segment: Segment;
  offset: number;
  bytes: number;
  free: boolean;
  before: Block | undefined;
  after: Block | undefined;
}

/** Free blocks by size, then address. */
export class FreeBlocks {
  private readonly sorted: Block[] = [];

  add(block: Block): void {
    this.sorted.splice(this.find(block.bytes, placeOf(block)), 0, block);
  }

  remove(block: Block): void {
    this.sorted.splice(this.find(block.bytes, placeOf(block)), 1);
  }

  /** The smallest block that holds `bytes`, the lowest of several. */
  bestFit(bytes: number): Block | undefined {
    return this.sorted[this.find(bytes, 0)];
  }

  /** The blocks that are whole segments. */
  whole(): Block[] {
    return this.sorted.filter((block) => block.bytes === block.segment.bytes);
  }

  get size(): number {
    return this.sorted.length;
  }

  get bytes(): number {
    return this.sorted.reduce((sum, block) => sum + block.bytes, 0);
  }

  /** Where a block of this size and address is, or would be. */
  private find(bytes: number, address: number): number {
    let low = 0;
    let high = this.sorted.length;
    while (low < high) {
      const mid = (low + high) >> 1;
      const block = this.sorted[mid]!;
      if (block.bytes < bytes || (block.bytes === bytes && placeOf(block) < address)) low = mid + 1;
      else high = mid;
    }
    return low;
  }
}

/** Makes one block of two neighbours. */
export function join(block: Block, next: Block): void {
  block.bytes += next.bytes;
  block.after = next.after;
  if (next.after) next.after.before = block;
}

const placeOf = (block: Block): number => block.segment.address + block.offset;
