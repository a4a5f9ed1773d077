/**
 * The optimizers' tables: which steps are measured, and how they are printed. Beside them stand bitsandbytes and torch
 * (bench/peer_optimizers.py), on as many parameters, in the same run.
 */
import { type CudaResult, type Gpu, measureCuda } from "./cuda.js";
import { gradientBenches } from "./gradient.bench.js";
import { type Bench, measure, type Result } from "./harness.js";
import { type Bits, SETTING_NAMES, type SettingName, smolLm2, stepBench } from "./optimizer.bench.js";

/** Parameters of a bench of the cpu. */
export const CPU_PARAMETERS = 8 * 1024 * 1024;
/** Of one on a GPU. */
export const CUDA_PARAMETERS = 128 * 1024 * 1024;

/** What bench/peer_optimizers.py prints: microseconds. */
export interface PeerOptimizers {
  readonly versions: string;
  readonly copy: number;
  readonly ops: Readonly<Record<string, number>>;
}

/** The benches of the cpu, in groups whose operands are in memory together. */
function cpuGroups(elements: number): Bench[][] {
  const groups = (["f32", "bf16"] as const).flatMap((dtype) =>
    ([32, 8] as const).map((bits) => [
      ...SETTING_NAMES.map((name) => stepBench(name, bits, dtype, elements)),
      stepBench("AdamW", bits, dtype, elements, { checked: true }),
    ]),
  );
  return [...groups, gradientBenches(elements)];
}

export async function measureOptimizers(
  threads: readonly number[],
  rounds: number,
  filter: string,
  elements = CPU_PARAMETERS,
): Promise<Result[]> {
  const results: Result[] = [];
  for (const count of threads) {
    for (const group of cpuGroups(elements)) {
      const wanted = group.filter(({ name }) => name.includes(filter));
      // Without the copy in front: what counts is each one's share of its own group's.
      if (wanted.length > 0) results.push(...(await measure(wanted, count, rounds)).slice(1));
    }
  }
  return results;
}

/** @param divisor makes everything so much smaller: for rehearsals */
function cudaBenches(elements: number, divisor: number): Bench[] {
  const one = (name: SettingName, bits: Bits, checked = false): Bench =>
    stepBench(name, bits, "bf16", elements, { checked });
  const model = smolLm2(divisor);
  const ofModel = (bits: Bits, checked: boolean): Bench =>
    stepBench("AdamW", bits, "bf16", model.elements, { model, checked, peer: `adamw_${bits}_bf16 model` });
  const inOne = (bits: Bits): Bench =>
    stepBench("AdamW", bits, "bf16", model.elements, {
      label: `one tensor of ${model.elements}`,
      peer: `adamw_${bits}_bf16 whole`,
    });
  return [
    one("Adam", 8),
    one("Adam", 8, true),
    one("Adam", 32),
    one("Adam", 32, true),
    ...(["AdamW", "Lion", "SGD", "AdEMAMix", "LAMB", "LARS", "RMSprop", "Adagrad"] as const).map((name) =>
      one(name, 8),
    ),
    ...(["AdamW", "Lion", "SGD", "AdEMAMix", "LAMB"] as const).map((name) => one(name, 32)),
    inOne(8),
    ofModel(8, false),
    ofModel(8, true),
    inOne(32),
    ofModel(32, false),
    ...gradientBenches(elements, ["bf16"]),
  ];
}

export async function measureOptimizersCuda(
  gpu: Gpu,
  rounds: number,
  filter: string,
  divisor = 1,
): Promise<CudaResult[]> {
  const elements = CUDA_PARAMETERS / divisor;
  const wanted = cudaBenches(elements, divisor).filter(({ name }) => name.includes(filter));
  return wanted.length > 0 ? measureCuda(gpu, wanted, elements, rounds) : [];
}

const row = (cells: readonly string[]): string => `| ${cells.join(" | ")} |`;
const head = (cells: readonly string[]): string => `${row(cells)}\n|${"---|".repeat(cells.length)}`;
const percent = (share: number): string => `${(share * 100).toFixed(0)} %`;
/** 10^6 parameters per second. */
const rate = (elements: number, microseconds: number): string => (elements / microseconds).toFixed(0);

/** A table of 10^6 parameters per second, and of shares of the copy's bytes per second. */
export function optimizerTable(
  results: readonly Result[],
  threads: readonly number[],
  peers?: Readonly<Record<number, PeerOptimizers>>,
): string {
  const count = (n: number, what: string): string => `${n} ${what}${n > 1 ? "s" : ""}`;
  const theirs = peers
    ? threads.flatMap((n) => [`bitsandbytes, ${count(n, "thread")}`, `torch fused, ${count(n, "thread")}`])
    : [];
  const lines = [...new Set(results.map(({ name }) => name))].map((name) => {
    const own = threads.map((n) => results.find((r) => r.name === name && r.threads === n)!);
    const [first] = own as [Result];
    const elements = first.gelem * first.milliseconds * 1e6;
    const cells = own.map(
      (r) => `${(r.gelem * 1e3).toFixed(0)} M/s, ${r.gbytes.toFixed(1)} GB/s, ${percent(r.ofCopy)}`,
    );
    const gain = threads.length > 1 ? `${(first.milliseconds / own.at(-1)!.milliseconds).toFixed(2)}x` : "-";
    const others = peers
      ? threads.flatMap((n) =>
          ["", "torch fused "].map((prefix) => {
            const time = peers[n]?.ops[`${prefix}${first.peer}`];
            return time === undefined ? "-" : rate(elements, time);
          }),
        )
      : [];
    return row([name, ...cells, gain, ...others]);
  });
  return [head(["", ...threads.map((n) => count(n, "worker")), "speed-up", ...theirs]), ...lines].join("\n");
}

export function optimizerTableCuda(results: readonly CudaResult[], peer?: PeerOptimizers): string {
  const names = ["", "µs", "launched, µs", "G parameters/s", "of copy", "floor, µs"];
  const lines = results.map((r) => {
    const floor = r.microseconds * r.ofCopy;
    const cells = [r.microseconds, r.launchedMicroseconds, r.gelem].map((value) => value.toFixed(1));
    const time = r.peer === undefined ? undefined : peer?.ops[r.peer];
    const other = peer ? [time?.toFixed(1) ?? "-", time ? `${(time / r.microseconds).toFixed(2)}x` : "-"] : [];
    return row([r.name, ...cells, percent(r.ofCopy), floor.toFixed(0), ...other]);
  });
  return [head([...names, ...(peer ? ["bitsandbytes, µs", "ours to theirs"] : [])]), ...lines].join("\n");
}
