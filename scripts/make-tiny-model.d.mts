export interface TinyModelOptions {
  readonly seed?: number;
  readonly hidden?: number;
  readonly intermediate?: number;
  readonly layers?: number;
  readonly heads?: number;
  readonly kvHeads?: number;
  readonly vocab?: number;
  readonly tied?: boolean;
  readonly dtype?: "bf16" | "f32";
  readonly maxShardSize?: string | number;
}

/** Writes a tiny Llama-shaped checkpoint into `folder`. */
export function makeTinyModel(folder: string, options?: TinyModelOptions): Promise<void>;
