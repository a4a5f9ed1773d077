/** Shapes are plain arrays of non-negative integers, row-major. */
export type Shape = readonly number[];

/** The number of elements of a shape; 1 for a scalar (empty shape). */
export function sizeOf(shape: Shape): number {
  let size = 1;
  for (const d of shape) size *= d;
  return size;
}

export function sameShape(a: Shape, b: Shape): boolean {
  return a.length === b.length && a.every((d, i) => d === b[i]);
}

/** `[2, 3]`, as messages print a shape. */
export function formatShape(shape: Shape): string {
  return `[${shape.join(", ")}]`;
}

export function ceilDiv(a: number, b: number): number {
  return Math.ceil(a / b);
}
