/** `tidy` scopes: which tensors were made inside, and which of them leave. */
import { ArgumentError } from "./errors.js";

/** What a scope can own: tensors, and things made of tensors (QuantState). */
export interface Disposable {
  dispose(): void;
}
/** Something that holds tensors, as `tidy` sees its result. */
export interface TensorHolder {
  tensors(): Iterable<Disposable>;
}

const scopes: Set<Disposable>[] = [];

/** Called by every new tensor: it belongs to the innermost scope. */
export function adopt(tensor: Disposable): void {
  scopes.at(-1)?.add(tensor);
}

/** Takes a tensor (or everything a QuantState, array or object holds) out of every scope: the caller disposes it. */
export function keep<T>(value: T): T {
  for (const tensor of held(value)) for (const scope of scopes) scope.delete(tensor);
  return value;
}

/**
 * Runs `fn` and disposes every tensor made inside it, except those in its result (a tensor, a QuantState, or arrays, maps
 * and plain objects of them). On an exception all are disposed.
 * @throws ArgumentError when `fn` returns a promise: what an async function makes after its first await cannot be seen
 */
export function tidy<T>(fn: () => T): T {
  const scope = new Set<Disposable>();
  scopes.push(scope);
  let kept: Iterable<Disposable> = [];
  try {
    const result = fn();
    if (result instanceof Promise) {
      result.catch(() => {});
      throw new ArgumentError("tidy", "fn", "a synchronous function", "one that returns a promise");
    }
    kept = held(result);
    return result;
  } finally {
    scopes.pop();
    for (const tensor of kept) if (scope.delete(tensor)) scopes.at(-1)?.add(tensor);
    for (const tensor of scope) tensor.dispose();
  }
}

function held(value: unknown, found = new Set<Disposable>(), seen = new Set<unknown>()): Set<Disposable> {
  if (typeof value !== "object" || value === null || seen.has(value) || ArrayBuffer.isView(value)) return found;
  seen.add(value);
  if (typeof (value as Partial<TensorHolder>).tensors === "function") {
    for (const tensor of (value as TensorHolder).tensors()) found.add(tensor);
  } else if (Array.isArray(value) || value instanceof Set) {
    for (const item of value) held(item, found, seen);
  } else if (value instanceof Map) {
    for (const item of value.values()) held(item, found, seen);
  } else if (Object.getPrototypeOf(value) === Object.prototype) {
    for (const item of Object.values(value)) held(item, found, seen);
  }
  return found;
}
