/** The file that has the table. */
export const DOCS: string;

/** Kinds of weights that the table tells apart, with some of each. */
export const WEIGHTS: readonly {
  readonly name: string;
  readonly shapes: readonly {
    readonly n: number;
    readonly k: number;
    readonly blocksize: number;
    readonly aligned: boolean;
  }[];
}[];

/** Which path a 4-bit product takes, and behind a blank line what runs there: two markdown tables. */
export function pathTable(): string;

/** A text with the table between its marks. */
export function withTable(text: string): string;
