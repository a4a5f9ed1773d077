export const ROOT: string;
export const COMPILE_OPTIONS: readonly string[];
export function kernelFiles(root?: string): { folder: string; families: string[]; headers: string[] };
export function kernelSources(from?: { root?: string; options?: readonly string[] }): string;
export function kernelFingerprint(from?: { root?: string; options?: readonly string[] }): string;
export const GEOMETRY: readonly string[];
