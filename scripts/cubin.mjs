/** Reads compiled kernel images: what a cubin (an ELF file) or PTX text holds, without any tool of CUDA's. */

const MAGIC = 0x464c457f;
const MACHINE_CUDA = 190;
const SYMTAB = 2;
const FUNC = 2;
const GLOBAL = 1;
/** Bytes of a symbol. */
const SYMBOL = 24;
/** Attributes in the section .nv.info, each of a symbol: registers of a kernel, bytes of a function's stack frame. */
const REGCOUNT = 0x2f;
const FRAME_SIZE = 0x11;
const ATTRIBUTE_WITH_DATA = 4;

/**
 * What a cubin says of itself.
 * @param {Uint8Array} bytes
 * @returns {{ osAbi: number, abiVersion: number, architecture: number,
 *   entries: { name: string, bytes: number, registers: number | undefined }[], frameBytes: number }}
 *   `frameBytes`: the largest stack frame of any function; registers are spilled there only, so 0 means no spills.
 * @throws {Error} not a whole cubin
 */
export function readCubin(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    return parse(view);
  } catch (error) {
    if (error instanceof RangeError) throw new Error("the cubin is truncated", { cause: error });
    throw error;
  }
}

function parse(view) {
  if (view.getUint32(0, true) !== MAGIC || view.getUint16(18, true) !== MACHINE_CUDA) throw new Error("not a cubin");
  const osAbi = view.getUint8(7);
  const abiVersion = view.getUint8(8);
  const flags = view.getUint32(48, true);
  // Up to ABI version 7 the architecture is the flags' lowest byte, from 8 on (CUDA 13) the one above.
  const architecture = (abiVersion >= 8 ? flags >>> 8 : flags) & 0xff;
  const sections = readSections(view);
  const symtab = sections.find(({ type }) => type === SYMTAB);
  if (!symtab) throw new Error("the cubin has no symbols");
  const symbols = readSymbols(view, symtab, sections[symtab.link]);
  const info = sections.find(({ name }) => name === ".nv.info");
  const attributes = info ? [...readAttributes(view, info)] : [];
  const registers = new Map(attributes.filter(({ kind }) => kind === REGCOUNT).map((a) => [a.symbol, a.value]));
  const frames = attributes.filter(({ kind }) => kind === FRAME_SIZE).map(({ value }) => value);
  const entries = symbols
    .filter((s) => s.type === FUNC && s.bind === GLOBAL && s.section !== 0)
    .map(({ name, bytes, index }) => ({ name, bytes, registers: registers.get(index) }))
    .sort((a, b) => (a.name < b.name ? -1 : 1));
  return { osAbi, abiVersion, architecture, entries, frameBytes: Math.max(0, ...frames) };
}

const offset = (view, at) => Number(view.getBigUint64(at, true));

function readSections(view) {
  const start = offset(view, 40);
  const [size, count, names] = [58, 60, 62].map((at) => view.getUint16(at, true));
  const sections = Array.from({ length: count }, (_, i) => {
    const at = start + i * size;
    const [nameAt, type] = [view.getUint32(at, true), view.getUint32(at + 4, true)];
    return {
      nameAt,
      type,
      offset: offset(view, at + 24),
      bytes: offset(view, at + 32),
      link: view.getUint32(at + 40, true),
    };
  });
  return sections.map((section) => ({ ...section, name: text(view, sections[names], section.nameAt) }));
}

function text(view, strings, at) {
  const start = strings.offset + at;
  let end = start;
  while (view.getUint8(end) !== 0) end++;
  return Buffer.from(view.buffer, view.byteOffset + start, end - start).toString("latin1");
}

function readSymbols(view, symtab, strings) {
  return Array.from({ length: symtab.bytes / SYMBOL }, (_, index) => {
    const at = symtab.offset + index * SYMBOL;
    const info = view.getUint8(at + 4);
    const [section, bytes] = [view.getUint16(at + 6, true), offset(view, at + 16)];
    return {
      index,
      name: text(view, strings, view.getUint32(at, true)),
      type: info & 15,
      bind: info >> 4,
      section,
      bytes,
    };
  });
}

function* readAttributes(view, info) {
  for (let at = info.offset; at < info.offset + info.bytes; ) {
    const [format, kind, size] = [view.getUint8(at), view.getUint8(at + 1), view.getUint16(at + 2, true)];
    at += 4;
    if (format !== ATTRIBUTE_WITH_DATA) continue;
    if (size === 8) yield { kind, symbol: view.getUint32(at, true), value: view.getUint32(at + 4, true) };
    at += size;
  }
}

/**
 * What a PTX text says of itself.
 * @param {string} ptx
 * @returns {{ version: string, architecture: number, entries: { name: string }[] }}
 * @throws {Error} not PTX
 */
export function readPtx(ptx) {
  const version = /^\.version\s+([\d.]+)/m.exec(ptx)?.[1];
  const target = /^\.target\s+sm_(\d+)/m.exec(ptx)?.[1];
  if (!version || !target) throw new Error("not PTX");
  const names = [...ptx.matchAll(/^\s*\.visible\s+\.entry\s+([\w$]+)/gm)].map(([, name]) => name).sort();
  return { version, architecture: Number(target), entries: names.map((name) => ({ name })) };
}
