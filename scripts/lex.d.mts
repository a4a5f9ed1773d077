export function tokens(text: string, language: "cpp" | "ts"): string[];
