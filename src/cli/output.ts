/** How the command speaks: numbers, tables, and the one JSON object of `--json`. */
import { HalfbyteError } from "../core/errors.js";

/** A failure that is no usage error: the process exits with 1. */
export const EXIT_FAILURE = 1;
/** The command line is wrong. */
export const EXIT_USAGE = 2;

/** Prints text as it is, with a line end. */
export function print(text: string): void {
  process.stdout.write(`${text}\n`);
}

/**
 * Prints the result of a command: one JSON object on a line of its own. Numbers that JSON does not have become null.
 */
export function printJson(value: object): void {
  process.stdout.write(`${JSON.stringify(value)}\n`);
}

/** `116.3 MB`: powers of 1,000, as disks and transformers count. */
export function formatBytes(bytes: number): string {
  return scaled(bytes, ["B", "kB", "MB", "GB", "TB"]);
}

/** `134.5 M`. */
export function formatCount(count: number): string {
  return scaled(count, ["", "K", "M", "G", "T"]).trimEnd();
}

function scaled(value: number, units: readonly string[]): string {
  let size = value;
  let unit = 0;
  // 999.96 would print as 1000.0.
  while (size >= 999.95 && unit < units.length - 1) {
    size /= 1000;
    unit++;
  }
  return `${unit === 0 ? Math.round(size) : size.toFixed(1)} ${units[unit]}`;
}

/** `0.85 s`, `42 s`, `3 min 20 s`. */
export function formatSeconds(seconds: number): string {
  if (seconds < 10) return `${seconds.toFixed(2)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  return `${minutes} min ${Math.round(seconds - 60 * minutes)} s`;
}

/** `576 x 1536`. */
export function formatDims(shape: readonly number[]): string {
  return shape.length === 0 ? "scalar" : shape.join(" x ");
}

/** A small number with three digits that count. */
export function formatError(value: number): string {
  if (value === 0 || !Number.isFinite(value)) return String(value);
  return value >= 1e-3 && value < 1e4 ? value.toPrecision(3) : value.toExponential(2);
}

export function formatPercent(fraction: number): string {
  return Number.isFinite(fraction) ? `${(100 * fraction).toFixed(2)} %` : String(fraction);
}

/** A column: its heading and on which side its cells are aligned. */
export interface Column {
  readonly title: string;
  readonly align?: "left" | "right";
}

/** Lines of aligned cells under their headings; columns two spaces apart. */
export function table(columns: readonly Column[], rows: readonly (readonly string[])[]): string {
  const widths = columns.map(({ title }, i) => Math.max(title.length, ...rows.map((row) => row[i]!.length)));
  const line = (cells: readonly string[]): string =>
    cells
      .map((cell, i) => (columns[i]!.align === "right" ? cell.padStart(widths[i]!) : cell.padEnd(widths[i]!)))
      .join("  ")
      .trimEnd();
  return [line(columns.map(({ title }) => title)), ...rows.map(line)].join("\n");
}

/** Lines of `label  value`, aligned. */
export function fields(entries: readonly (readonly [label: string, value: string])[]): string {
  const width = Math.max(...entries.map(([label]) => label.length));
  return entries.map(([label, value]) => `${label.padEnd(width)}  ${value}`).join("\n");
}

/** What `--json` says of an error. */
export function describeError(error: unknown): { readonly code: string; readonly message: string } {
  if (error instanceof HalfbyteError) return { code: error.code, message: error.message };
  const code = (error as { code?: unknown } | null)?.code;
  const message = error instanceof Error ? error.message : String(error);
  return { code: typeof code === "string" ? code : "ERR_UNEXPECTED", message };
}
