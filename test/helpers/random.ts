/** Seeded randomness that is the same on every machine. */

/** A generator of uint32 (splitmix32), seeded by a number or by any text. */
export function random(seed: number | string): () => number {
  let state = typeof seed === "number" ? seed | 0 : 0x811c9dc5;
  if (typeof seed === "string") for (const c of seed) state = Math.imul(state ^ c.charCodeAt(0), 0x01000193);
  return () => {
    state = (state + 0x9e3779b9) | 0;
    let z = state ^ (state >>> 16);
    z = Math.imul(z, 0x21f0aaad);
    z ^= z >>> 15;
    z = Math.imul(z, 0x735a2d97);
    return (z ^ (z >>> 15)) >>> 0;
  };
}

/** Roughly normal float32 values (sum of four uniforms, no transcendental functions), standard deviation about 1. */
export function normals(n: number, seed: number | string, scale = 1): Float32Array<ArrayBuffer> {
  const next = random(seed);
  const values = new Float32Array(n);
  for (let i = 0; i < n; i++) {
    values[i] = ((next() + next() + next() + next()) / 2 ** 32 - 2) * 1.73 * scale;
  }
  return values;
}
