/** A progress bar on a terminal's stderr; nothing anywhere else. */
import { Presets, SingleBar } from "cli-progress";
import { formatCount, formatSeconds } from "./output.js";

/** How far a command is, in elements. */
export interface Progress {
  readonly done: number;
  readonly total: number;
  readonly tensor: string;
}

export interface ProgressBar {
  update(progress: Progress): void;
  /** Takes the bar off the screen. */
  stop(): void;
}

/** The least terminal that the bar fits on without the tensor's name. */
const WIDTH = 64;

/** @param quiet no bar in any case (`--json`) */
export function progressBar(label: string, quiet: boolean): ProgressBar {
  const { stderr } = process;
  if (quiet || !stderr.isTTY) return { update() {}, stop() {} };
  const started = performance.now();
  const bar = new SingleBar(
    {
      stream: stderr,
      hideCursor: true,
      clearOnComplete: true,
      barsize: 24,
      fps: 8,
      format: (options, params, payload: { tensor?: string }) => {
        const fraction = params.total > 0 ? params.value / params.total : 0;
        const filled = Math.round(fraction * (options.barsize ?? 24));
        const full = (options.barCompleteString ?? "").slice(0, filled);
        const rest = (options.barIncompleteString ?? "").slice(0, (options.barsize ?? 24) - filled);
        const seconds = (performance.now() - started) / 1000;
        const rate = params.value / Math.max(seconds, 1e-3);
        const left = rate > 0 ? formatSeconds((params.total - params.value) / rate) : "?";
        const head = `${label} ${full}${rest} ${String(Math.floor(100 * fraction)).padStart(3)} %`;
        const line = `${head}  ${formatCount(rate)}/s  ${left} left`;
        const room = (stderr.columns ?? WIDTH) - line.length - 3;
        const { tensor = "" } = payload;
        return tensor.length <= room ? `${line}  ${tensor}` : line;
      },
    },
    Presets.shades_classic,
  );
  let running = false;
  return {
    update({ done, total, tensor }) {
      if (!running) bar.start(total, 0, { tensor });
      running = true;
      bar.update(done, { tensor });
    },
    stop() {
      if (running) bar.stop();
      running = false;
    },
  };
}
