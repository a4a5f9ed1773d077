/**
 * The tokenizer of a GGUF file as tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template,
 * for byte-level BPE ("gpt2"). It gives the ids that transformers 5 gives from the same file; that library's choices are
 * followed where the file leaves one open. One difference: transformers drops control and user-defined tokens with
 * characters outside GPT-2's byte alphabet (such as `<｜User｜>`), here they are matched whole, as llama.cpp does.
 */
import { FormatError, UnsupportedError } from "../core/errors.js";
import { tokenId } from "./gguf-config.js";
import { type GgufMetadata, lookUp, requireValue } from "./gguf-metadata.js";

/** ggml's token types that matter here; the others are ordinary vocabulary. */
const CONTROL = 3;
const USER_DEFINED = 4;

const WHITESPACE = String.raw`\s*[\r\n]+|\s+(?!\S)|\s+`;
const CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const WORD = String.raw`[^\r\n\p{L}\p{N}]?\p{L}+`;
const PUNCTUATION = String.raw` ?[^\s\p{L}\p{N}]+[\r\n]*`;
const LLAMA3_SPLIT = `${CONTRACTIONS}|${WORD}|\\p{N}{1,3}|${PUNCTUATION}|${WHITESPACE}`;
const QWEN2_SPLIT = `${CONTRACTIONS}|${WORD}|\\p{N}|${PUNCTUATION}|${WHITESPACE}`;
/** Words of Mistral's Tekken end before an upper-case letter that follows a lower-case one. */
const UPPER = String.raw`[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`;
const LOWER = String.raw`[\p{Ll}\p{Lm}\p{Lo}\p{M}]`;
const TEKKEN_SPLIT = [
  String.raw`[^\r\n\p{L}\p{N}]?${UPPER}*${LOWER}+`,
  String.raw`[^\r\n\p{L}\p{N}]?${UPPER}+${LOWER}*`,
  String.raw`\p{N}`,
  String.raw` ?[^\s\p{L}\p{N}]+[\r\n/]*`,
  WHITESPACE,
].join("|");

/** How text is cut before merging, by `tokenizer.ggml.pre`: a regular expression, or GPT-2's own split (null). */
const SPLITS: ReadonlyMap<string, string | null> = new Map([
  ["default", null],
  ["gpt-2", null],
  // transformers splits as GPT-2 does; the tokenizer these models were trained with also cuts before every digit. The
  // ids can differ where digits follow a run of white space, and for numerals outside ASCII.
  ["smollm", null],
  ["llama-bpe", LLAMA3_SPLIT],
  ["llama3", LLAMA3_SPLIT],
  ["llama-v3", LLAMA3_SPLIT],
  ["smaug-bpe", LLAMA3_SPLIT],
  ["falcon3", LLAMA3_SPLIT],
  ["pixtral", LLAMA3_SPLIT],
  ["dbrx", LLAMA3_SPLIT],
  ["qwen2", QWEN2_SPLIT],
  ["deepseek-r1-qwen", QWEN2_SPLIT],
  ["megrez", QWEN2_SPLIT],
  ["tekken", TEKKEN_SPLIT],
]);

const TYPE_NAMES: Readonly<Record<string, string>> = {
  llama: "SentencePiece",
  bert: "WordPiece",
  t5: "Unigram",
  rwkv: "RWKV",
  none: "no vocabulary",
};

const SPECIAL_NAMES = ["bos_token", "eos_token", "pad_token", "unk_token"] as const;
type SpecialName = (typeof SPECIAL_NAMES)[number];

/** A byte-level BPE tokenizer as a GGUF file describes it. */
export interface GgufTokenizer {
  /** Token to id. */
  readonly vocab: ReadonlyMap<string, number>;
  readonly merges: readonly (readonly [string, string])[];
  /** Tokens that are matched whole in the text, by id. */
  readonly added: ReadonlyMap<number, { readonly content: string; readonly special: boolean }>;
  readonly special: Readonly<Partial<Record<SpecialName, string>>>;
  /** A regular expression, or null for GPT-2's split. */
  readonly split: string | null;
  readonly addBos: boolean;
  readonly addEos: boolean;
  readonly chatTemplate: string | undefined;
  readonly maxLength: number | undefined;
}

/**
 * Reads the tokenizer from metadata. Throws UnsupportedError, saying what to do, for other kinds than "gpt2" and for an
 * unknown pre-tokenizer; FormatError when vocabulary, merges and special tokens are missing or do not fit together.
 */
export function readGgufTokenizer(file: GgufMetadata): GgufTokenizer {
  const split = readSplit(file);
  const tokens = requireValue(file, "tokenizer.ggml.tokens", "strings");
  const types = lookUp(file, "tokenizer.ggml.token_type", "integers");
  if (types && types.length !== tokens.length) {
    throw fault(file, `tokenizer.ggml.token_type has ${types.length} entries, tokenizer.ggml.tokens ${tokens.length}`);
  }
  const added = new Map<number, { content: string; special: boolean }>();
  for (const [id, type] of types?.entries() ?? []) {
    if (type === CONTROL || type === USER_DEFINED) added.set(id, { content: tokens[id]!, special: type === CONTROL });
  }
  const special = readSpecialTokens(file, tokens, added);
  const vocab = new Map(tokens.map((token, id) => [added.has(id) ? token : byteSpelling(token), id]));
  const architecture = lookUp(file, "general.architecture", "string");
  return {
    vocab,
    merges: readMerges(file, vocab),
    added: new Map([...added].sort(([a], [b]) => a - b)),
    special,
    split,
    addBos: (lookUp(file, "tokenizer.ggml.add_bos_token", "boolean") ?? false) && special.bos_token !== undefined,
    addEos: (lookUp(file, "tokenizer.ggml.add_eos_token", "boolean") ?? false) && special.eos_token !== undefined,
    chatTemplate: lookUp(file, "tokenizer.chat_template", "string"),
    maxLength: lookUp(file, `${architecture}.context_length`, "integer"),
  };
}

function readSplit(file: GgufMetadata): string | null {
  const copy = "copy the tokenizer files from the model's original repository";
  const model = lookUp(file, "tokenizer.ggml.model", "string");
  if (model === undefined) throw new UnsupportedError("a GGUF file without a tokenizer", copy);
  if (model !== "gpt2") {
    const name = Object.hasOwn(TYPE_NAMES, model) ? ` (${TYPE_NAMES[model]})` : "";
    throw new UnsupportedError(`converting a tokenizer of type '${model}'${name}`, copy);
  }
  const pre = lookUp(file, "tokenizer.ggml.pre", "string") ?? "default";
  const split = SPLITS.get(pre);
  if (split === undefined) {
    const known = [...SPLITS.keys()].join(", ");
    throw new UnsupportedError(`converting a tokenizer with pre-tokenizer '${pre}'`, `known are ${known}; ${copy}`);
  }
  return split;
}

function readMerges(file: GgufMetadata, vocab: ReadonlyMap<string, number>): [string, string][] {
  const key = "tokenizer.ggml.merges";
  return requireValue(file, key, "strings").map((merge, rank) => {
    const [left, right, ...rest] = merge.split(" ");
    if (!left || !right || rest.length > 0) throw fault(file, `${key}[${rank}] is '${merge}', expected two tokens`);
    for (const token of [left, right, left + right]) {
      if (!vocab.has(token))
        throw fault(file, `${key}[${rank}] is '${merge}', but '${token}' is not in the vocabulary`);
    }
    return [left, right];
  });
}

/** The named special tokens, which are also added to those matched whole. */
function readSpecialTokens(
  file: GgufMetadata,
  tokens: readonly string[],
  added: Map<number, { content: string; special: boolean }>,
): Partial<Record<SpecialName, string>> {
  const ids: Record<SpecialName, number | undefined> = {
    bos_token: tokenId(file, "bos"),
    eos_token: tokenId(file, "eos"),
    pad_token: tokenId(file, "padding"),
    unk_token: tokenId(file, "unknown"),
  };
  const special: Partial<Record<SpecialName, string>> = {};
  for (const name of SPECIAL_NAMES) {
    const id = ids[name];
    if (id === undefined) continue;
    const content = tokens[id];
    if (content === undefined) throw fault(file, `${name} has id ${id}, the vocabulary ${tokens.length} tokens`);
    special[name] = content;
    added.set(id, { content, special: true });
  }
  return special;
}

function fault(file: GgufMetadata, problem: string): FormatError {
  return new FormatError("gguf", file.path, problem);
}

/** GPT-2's spelling of bytes: printable Latin-1 as itself, the other 68 from U+0100 on. */
const BYTE_CHARACTERS: readonly string[] = (() => {
  const printable = (byte: number): boolean => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : next++));
})();
const BYTE_ALPHABET: ReadonlySet<string> = new Set(BYTE_CHARACTERS);

/** The token as the BPE model sees it: some files hold plain text where the byte spelling belongs. */
function byteSpelling(token: string): string {
  for (const character of token) {
    if (!BYTE_ALPHABET.has(character)) return Array.from(Buffer.from(token), (byte) => BYTE_CHARACTERS[byte]!).join("");
  }
  return token;
}

/** The files of a tokenizer, by name: each made when it is asked for. */
export function tokenizerFiles(tokenizer: GgufTokenizer): ReadonlyMap<string, () => string> {
  const files = new Map([
    ["tokenizer.json", () => tokenizerJson(tokenizer)],
    ["tokenizer_config.json", () => `${pretty(tokenizerConfig(tokenizer))}\n`],
    ["special_tokens_map.json", () => `${pretty(tokenizer.special)}\n`],
  ]);
  const { chatTemplate } = tokenizer;
  if (chatTemplate !== undefined) files.set("chat_template.jinja", () => chatTemplate);
  return files;
}

function pretty(value: unknown): string {
  return JSON.stringify(value, null, 2);
}

function tokenizerConfig({ special, maxLength }: GgufTokenizer): Record<string, unknown> {
  return {
    clean_up_tokenization_spaces: false,
    ...special,
    ...(maxLength === undefined ? {} : { model_max_length: maxLength }),
    // The name that both transformers 4 and 5 know.
    tokenizer_class: "PreTrainedTokenizerFast",
  };
}

/**
 * tokenizer.json in the layout that the tokenizers library writes. Vocabulary and merges are written by hand: a token
 * can be any string, and an object's keys would come out in another order where they look like numbers.
 */
function tokenizerJson(tokenizer: GgufTokenizer): string {
  const head = pretty({
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: [...tokenizer.added].map(([id, { content, special }]) => ({
      id,
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special,
    })),
    normalizer: null,
    pre_tokenizer: preTokenizer(tokenizer.split),
    post_processor: postProcessor(tokenizer),
    decoder: { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true },
  });
  const vocab = [...tokenizer.vocab]
    .sort(([, a], [, b]) => a - b)
    .map(([t, id]) => `      ${JSON.stringify(t)}: ${id}`);
  const merges = tokenizer.merges.map(([left, right]) => {
    return `      [\n        ${JSON.stringify(left)},\n        ${JSON.stringify(right)}\n      ]`;
  });
  const model = [
    `"type": "BPE"`,
    `"dropout": null`,
    `"unk_token": null`,
    `"continuing_subword_prefix": ""`,
    `"end_of_word_suffix": ""`,
    `"fuse_unk": false`,
    `"byte_fallback": false`,
    `"ignore_merges": false`,
    `"vocab": ${block("{", vocab, "}")}`,
    `"merges": ${block("[", merges, "]")}`,
  ];
  return `${head.slice(0, -"\n}".length)},\n  "model": {\n    ${model.join(",\n    ")}\n  }\n}`;
}

function block(open: string, lines: readonly string[], close: string): string {
  return lines.length === 0 ? open + close : `${open}\n${lines.join(",\n")}\n    ${close}`;
}

function preTokenizer(split: string | null): unknown {
  const byteLevel = { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: split === null };
  if (split === null) return byteLevel;
  return {
    type: "Sequence",
    pretokenizers: [{ type: "Split", pattern: { Regex: split }, behavior: "Isolated", invert: false }, byteLevel],
  };
}

/** The template that puts the begin and end tokens round a text, where the file asks for them. */
function postProcessor({ special, added, addBos, addEos }: GgufTokenizer): unknown {
  const bos = addBos ? special.bos_token : undefined;
  const eos = addEos ? special.eos_token : undefined;
  const sequence = (id: "A" | "B", type_id: number): unknown[] => [
    ...(bos === undefined ? [] : [{ SpecialToken: { id: bos, type_id } }]),
    { Sequence: { id, type_id } },
    ...(eos === undefined ? [] : [{ SpecialToken: { id: eos, type_id } }]),
  ];
  const entry = (token: string): [string, unknown] => {
    const id = [...added].find(([, { content }]) => content === token)![0];
    return [token, { id: token, ids: [id], tokens: [token] }];
  };
  const used = [bos, eos].filter((token) => token !== undefined);
  return {
    type: "TemplateProcessing",
    single: sequence("A", 0),
    pair: [...sequence("A", 0), ...sequence("B", 1)],
    special_tokens: Object.fromEntries(used.map(entry)),
  };
}
