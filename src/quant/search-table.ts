/**
 * The fast search's table: the code nearest to a scaled value by one look-up and one addition, exactly.
 *
 * The bits of a float32 below 2 in magnitude, all of them inverted when it is negative, are a 31-bit number i that grows
 * with the value on either side of zero (the positive values below 2^30, the negative ones from there on). The values whose i shares its
 * upper bits form a bin; a table exists when no bin holds more than one boundary between codes, and none more than one
 * code wide. Entry e of the bin then satisfies, for every value in it, `code = (e + i) >>> 24` in 32-bit arithmetic: it
 * holds the bin's first code in the top byte, takes the bin's own position away again and adds what makes the position
 * of the boundary carry into the top byte.
 *
 * Layout, little endian: SEARCH_HEADER bytes, then 2^(31 - SEARCH_SHIFT) entries (u32). The header's first word is a
 * float32, the smallest magnitude whose code differs from that of zero: below it nobody needs to flush denormals.
 * Only the lines that data touches ever enter a cache: a few KiB, although the table has 128.
 */

/** Bits of i within a bin: 2^7 bins for every power of two. */
export const SEARCH_SHIFT = 16;
/** Bytes before the first entry. */
export const SEARCH_HEADER = 64;

const BINS = 2 ** (31 - SEARCH_SHIFT);
const BIN = 2 ** SEARCH_SHIFT;
const TOP = 2 ** 24;
const NEGATIVE = 0x40000000;
const SMALLEST_NORMAL = 2 ** -126;

/**
 * The code of a scaled value: the reference that the kernels' search and every table must equal.
 *
 * The nearest of the two neighbours, compared with their midpoint in float32; on the midpoint the even index. Values
 * below the smallest normal count as zero, and zero gets the first of several zeros.
 * @param code 256 values in non-decreasing order
 * @param scaled a float32
 */
export function searchCode(code: Float32Array, scaled: number): number {
  return nearestCode(code, Math.abs(scaled) < SMALLEST_NORMAL ? 0 : scaled);
}

function nearestCode(code: Float32Array, s: number): number {
  let high = 0;
  for (let step = 128; step > 0; step >>= 1) {
    if (code[high + step - 1]! < s) high += step;
  }
  if (high === 0) return 0;
  const low = high - 1;
  const middle = Math.fround(Math.fround(code[low]! + code[high]!) * 0.5);
  if (s > middle) return high;
  if (s < middle) return low;
  return high & 1 ? low : high;
}

/**
 * The code of a scaled optimizer state: the reference for first moments. As `searchCode`, but denormals are what they are, and what
 * has its sign set (-0 too) does not get the code of a zero but the one below it, where there is one: a negative stays negative.
 * @param code 256 values in strictly increasing order
 * @param scaled a float32
 */
export function stateCode(code: Float32Array, scaled: number): number {
  const found = nearestCode(code, scaled);
  const negative = scaled < 0 || Object.is(scaled, -0);
  return negative && found > 0 && code[found] === 0 ? found - 1 : found;
}

export interface SearchTableOptions {
  /** Whose codes the table gives: `stateCode`'s instead of `searchCode`'s. */
  readonly state?: boolean;
}

/**
 * Builds the table of a codebook.
 * @param code 256 finite values in non-decreasing order
 * @returns the bytes the kernel wants, or null when two boundaries are too close together for a table: such a codebook
 * needs the exact search
 */
export function buildSearchTable(code: Float32Array, options: SearchTableOptions = {}): Uint8Array<ArrayBuffer> | null {
  const bytes = new Uint8Array(SEARCH_HEADER + BINS * 4);
  const entries = new Uint32Array(bytes.buffer, SEARCH_HEADER);
  const bits = new Uint32Array(1);
  const value = new Float32Array(bits.buffer);
  const valueAt = (i: number): number => {
    bits[0] = i < NEGATIVE ? i : ~i;
    return value[0]!;
  };
  const rule = options.state ? stateCode : searchCode;
  const codeAt = (i: number): number => rule(code, valueAt(i));
  /** The first i of (from, to] whose code is at least `wanted`, which that of `to` is and that of `from` is not. */
  const firstWith = (wanted: number, from: number, to: number): number => {
    let below = from;
    let above = to;
    while (above - below > 1) {
      const middle = Math.floor((below + above) / 2);
      if (codeAt(middle) < wanted) below = middle;
      else above = middle;
    }
    return above;
  };

  for (let bin = 0; bin < BINS; bin++) {
    const first = bin * BIN;
    const last = first + BIN - 1;
    const base = codeAt(first);
    const rise = codeAt(last) - base;
    if (rise > 1) return null;
    const boundary = rise === 1 ? firstWith(base + 1, first, last) - first : BIN;
    entries[bin] = base * TOP + (TOP - boundary) - first;
  }

  const zero = codeAt(0);
  let floor = Number.POSITIVE_INFINITY;
  if (codeAt(NEGATIVE - 1) > zero) floor = valueAt(firstWith(zero + 1, 0, NEGATIVE - 1));
  if (codeAt(NEGATIVE) < zero) floor = Math.min(floor, -valueAt(firstWith(zero, NEGATIVE, 2 * NEGATIVE - 1) - 1));
  new Float32Array(bytes.buffer, 0, 1)[0] = floor;
  return bytes;
}
