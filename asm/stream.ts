/**
 * The command stream: every thread runs this loop over the ring of records in shared memory.
 *
 * A worker at command k waits until every command below k is complete (LOW >= k), claims parts of k until none is left,
 * and goes on to k + 1. Whoever finishes the last part of k publishes LOW = k + 1. There is no barrier: a worker that
 * comes late finds k complete and jumps to LOW. Its progress word keeps the main thread from reusing a slot that it may
 * still look at.
 *
 * Kernels are reached by call_indirect only: one inlined into this endless loop would never leave the baseline tier.
 * Sleeping is an import (Atomics.wait): Node 20 miscompiles the wait instruction in its baseline tier.
 */
import {
  ABORT,
  FAULTS,
  FENCE,
  HEAD,
  LINE,
  LOW,
  LOW_WAITERS,
  NO_FAULT,
  PARKED,
  PROGRESS,
  RECORD_BYTES,
  RECORD_CLAIMED,
  RECORD_FAULT,
  RECORD_FINISHED,
  RECORD_KERNEL,
  RECORD_OPERANDS,
  RECORD_PAGES,
  RECORD_PARTS,
  RECORD_PER,
  RECORD_UNITS,
  RING,
  RING_SLOTS,
  SPINS,
} from "./generated/constants";

/** Sleeps until somebody notifies `address`, unless it no longer holds `expected`. Main's version throws when workers are lost. */
// @ts-expect-error: decorator
@external("env", "wait")
declare function wait(address: usize, expected: u32): void;

/** A kernel found something wrong with its input: keeps the smallest index reported for the command. */
export function fault(op: usize, index: u32): void {
  const word = op - RECORD_OPERANDS + RECORD_FAULT;
  let seen = atomic.load<u32>(word);
  while (index < seen) {
    const before = atomic.cmpxchg<u32>(word, seen, index);
    if (before == seen) return;
    seen = before;
  }
}

/** The command a read waits for: by the time it runs everything before it is complete. Its operand is its own number. */
export function fence(op: usize, _begin: u32, _end: u32): void {
  atomic.store<u32>(FENCE, load<u32>(op));
  atomic.notify(FENCE, -1);
}

/** This thread's SCRATCH_BYTES, on a page of their own. A global belongs to an instance, and so to a thread. */
let scratchMemory: usize = 0;
/** Memory that no other thread uses while a part runs; what it holds at the start of a part is not defined. */
export function scratch(): usize {
  return scratchMemory;
}

/** A worker's life: ends only when the stream is aborted. `slot` is the worker's progress line. */
export function run(slot: u32, memory: usize): void {
  scratchMemory = memory;
  follow(slot, 0, false);
}

/** The main thread helps until every command below `target` is complete. */
export function drain(slot: u32, target: u32, memory: usize): void {
  scratchMemory = memory;
  follow(slot, target, true);
}

function follow(slot: u32, target: u32, bounded: bool): void {
  const progress = PROGRESS + slot * LINE;
  let k = enter(progress);
  while (!atomic.load<u32>(ABORT)) {
    const low = atomic.load<u32>(LOW);
    if (bounded && <i32>(low - target) >= 0) break;
    if (low != k) {
      if (<i32>(low - k) > 0) {
        k = low;
        atomic.store<u32>(progress, k);
      } else {
        sleepOnLow(low);
      }
    } else if (atomic.load<u32>(HEAD) == k) {
      sleepOnHead(progress, k);
      k = enter(progress);
    } else {
      work(RING + (k & (RING_SLOTS - 1)) * RECORD_BYTES, k);
      k++;
      atomic.store<u32>(progress, k);
    }
  }
  atomic.store<u32>(progress + 4, 1);
}

/** Announces that this thread looks at LOW; the caller reads LOW again before it touches a record. */
function enter(progress: usize): u32 {
  const k = atomic.load<u32>(LOW);
  atomic.store<u32>(progress, k);
  atomic.store<u32>(progress + 4, 0);
  return k;
}

function work(record: usize, k: u32): void {
  if (memory.size() < load<i32>(record + RECORD_PAGES)) learnGrowth(load<i32>(record + RECORD_PAGES));
  const kernel = load<u32>(record + RECORD_KERNEL);
  const parts = load<u32>(record + RECORD_PARTS);
  const units = load<u32>(record + RECORD_UNITS);
  const per = load<u32>(record + RECORD_PER);
  for (let part = claim(record); part < parts; part = claim(record)) {
    const begin = part * per;
    const end = part == parts - 1 ? units : begin + per;
    call_indirect<void>(kernel, record + RECORD_OPERANDS, begin, end);
    if (atomic.add<u32>(record + RECORD_FINISHED, 1) == parts - 1) complete(record, k);
  }
}

// @ts-expect-error: decorator
@inline
function claim(record: usize): u32 {
  return atomic.add<u32>(record + RECORD_CLAIMED, 1);
}

/**
 * A grow on the main thread reaches this instance with its thread's next interrupt. Plain loads and stores do not mind, but
 * bulk instructions check against the size that the instance knows, and would trap. Calls into JavaScript let
 * interrupts in; this one comes back at once, since ABORT is not 1.
 */
function learnGrowth(pages: i32): void {
  while (memory.size() < pages && !atomic.load<u32>(ABORT)) wait(ABORT, 1);
}

/**
 * Runs on one thread per command, in the order of the commands. A fault stays in its record, where the main thread looks for
 * it once FAULTS has grown.
 */
function complete(record: usize, k: u32): void {
  if (atomic.load<u32>(record + RECORD_FAULT) != NO_FAULT) atomic.add<u32>(FAULTS, 1);
  atomic.store<u32>(LOW, k + 1);
  if (atomic.load<u32>(LOW_WAITERS)) atomic.notify(LOW, -1);
}

function sleepOnLow(low: u32): void {
  for (let i = 0; i < <i32>SPINS; i++) if (atomic.load<u32>(LOW) != low) return;
  atomic.add<u32>(LOW_WAITERS, 1);
  if (!atomic.load<u32>(ABORT)) wait(LOW, low);
  atomic.sub<u32>(LOW_WAITERS, 1);
}

function sleepOnHead(progress: usize, k: u32): void {
  for (let i = 0; i < <i32>SPINS; i++) if (atomic.load<u32>(HEAD) != k) return;
  atomic.store<u32>(progress + 4, 1);
  atomic.add<u32>(PARKED, 1);
  if (!atomic.load<u32>(ABORT)) wait(HEAD, k);
  atomic.sub<u32>(PARKED, 1);
}
