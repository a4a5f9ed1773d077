/**
 * What the backends of a process share: the primary context of one device, retained once and counted, and the completions
 * that the addon reports. The process stays alive while any is outstanding.
 */
import { ArgumentError } from "../../core/errors.js";
import type { CudaAddon, Status } from "./addon.js";
import type { CudaDriver } from "./device.js";
import { check } from "./load.js";

export class SharedContext {
  private users = 0;
  private ordinal = -1;
  private token = 0;
  private readonly waiting = new Map<number, (status: Status) => void>();

  private constructor(private readonly addon: CudaAddon) {}

  private static readonly all = new WeakMap<CudaAddon, SharedContext>();

  /** Retains the primary context of a device, once for all who ask. @throws CudaError, ArgumentError for a second device */
  static acquire({ addon }: CudaDriver, ordinal: number): SharedContext {
    let context = SharedContext.all.get(addon);
    if (!context) {
      context = new SharedContext(addon);
      SharedContext.all.set(addon, context);
    }
    context.retain(ordinal);
    return context;
  }

  /** Gives one user's share back. Never throws: there is nobody who could do better. */
  release(): void {
    if (--this.users > 0) return;
    this.waiting.clear();
    this.addon.releaseContext();
  }

  /** Calls `done` on the event loop when `event` is over, and keeps the process alive until then. */
  watch(event: number, done: (status: Status) => void): Status {
    this.token = (this.token + 1) % 0x7fffffff;
    const status = this.addon.watch(event, this.token);
    if (status !== 0) return status;
    this.waiting.set(this.token, done);
    if (this.waiting.size === 1) this.addon.hold(true);
    return 0;
  }

  private retain(ordinal: number): void {
    const { addon } = this;
    if (this.users > 0) {
      if (ordinal !== this.ordinal) {
        throw new ArgumentError("cuda", "device", `${this.ordinal}, which this process uses already`, String(ordinal));
      }
    } else {
      check(addon, "retainContext", addon.retainContext(ordinal));
      const status = addon.onCompleted((token, result) => this.completed(token, result));
      if (status !== 0) addon.releaseContext();
      check(addon, "onCompleted", status);
      this.ordinal = ordinal;
    }
    this.users++;
  }

  private completed(token: number, status: Status): void {
    const done = this.waiting.get(token);
    this.waiting.delete(token);
    try {
      done?.(status);
    } finally {
      if (this.waiting.size === 0) this.addon.hold(false);
    }
  }
}
