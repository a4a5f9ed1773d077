import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { Tokenizer } from "@huggingface/tokenizers";
import { beforeAll, describe, expect, it } from "vitest";
import { FormatError, UnsupportedError } from "#halfbyte/core/errors.js";
import { type GgufValue, openGguf } from "#halfbyte/formats/gguf.js";
import { readGgufTokenizer, tokenizerFiles } from "#halfbyte/formats/gguf-tokenizer.js";

interface Variant {
  pre: string;
  add_bos?: boolean;
  add_eos?: boolean;
  /** What transformers makes of each piece. */
  ids: number[][];
}

const fixture = (name: string): string => fileURLToPath(new URL(`../fixtures/${name}`, import.meta.url));
const { pieces, variants, smollm2 } = JSON.parse(readFileSync(fixture("tokenizer-ids.json"), "utf8")) as {
  pieces: string[];
  variants: Record<string, Variant>;
  /** The ids of SmolLM2-135M-Instruct's tokenizer, as transformers makes it from the model's GGUF. */
  smollm2: number[][];
};

let metadata: ReadonlyMap<string, GgufValue>;
beforeAll(async () => {
  const file = await openGguf(fixture("gguf-tokenizer.gguf"));
  metadata = file.metadata;
  await file.close();
});

type Change = Record<string, GgufValue | undefined>;
const changed = (change: Change): { path: string; metadata: Map<string, GgufValue> } => {
  const entries = new Map(metadata);
  for (const [key, value] of Object.entries(change)) {
    if (value === undefined) entries.delete(`tokenizer.${key}`);
    else entries.set(`tokenizer.${key}`, value);
  }
  return { path: "test.gguf", metadata: entries };
};

function filesOf(change: Change = {}): { json: Record<string, unknown>; config: object; names: string[] } {
  const files = tokenizerFiles(readGgufTokenizer(changed(change)));
  return {
    json: JSON.parse(files.get("tokenizer.json")!()) as Record<string, unknown>,
    config: JSON.parse(files.get("tokenizer_config.json")!()) as object,
    names: [...files.keys()],
  };
}

function load(change: Change = {}): Tokenizer {
  const { json, config } = filesOf(change);
  return new Tokenizer(json, config);
}

const settings = ({ pre, add_bos = false, add_eos = false }: Variant): Change => ({
  "ggml.pre": pre,
  "ggml.add_bos_token": add_bos,
  "ggml.add_eos_token": add_eos,
});

describe("tokenizerFiles", () => {
  for (const [label, variant] of Object.entries(variants)) {
    it(`${label}: the ids of transformers, and back to the text`, () => {
      const tokenizer = load(settings(variant));
      expect(variant.ids).toHaveLength(pieces.length);
      for (const [i, piece] of pieces.entries()) {
        expect(tokenizer.encode(piece).ids, JSON.stringify(piece)).toEqual(variant.ids[i]);
        if (piece === "") continue;
        const plain = tokenizer.encode(piece, { add_special_tokens: false }).ids;
        expect(tokenizer.decode(plain, { skip_special_tokens: false })).toBe(piece);
      }
    });
  }

  const folder = process.env.HALFBYTE_TEST_MODEL;
  const label = "SmolLM2-135M-Instruct: the ids of transformers";
  if (folder === undefined) {
    it.skip(`${label} (skipped: set HALFBYTE_TEST_MODEL to a folder with its .gguf file)`, () => undefined);
  } else {
    it(label, async () => {
      const file = await openGguf(join(folder, readdirSync(folder).find((name) => name.endsWith(".gguf"))!));
      await file.close();
      const files = tokenizerFiles(readGgufTokenizer(file));
      const [json, config] = ["tokenizer.json", "tokenizer_config.json"].map((name) => JSON.parse(files.get(name)!()));
      const tokenizer = new Tokenizer(json, config);
      for (const [i, piece] of pieces.entries()) expect(tokenizer.encode(piece).ids, piece).toEqual(smollm2[i]);
    });
  }

  it("is tested on text that each way of splitting cuts differently", () => {
    const inner = ["smollm", "llama-bpe, adds bos and eos", "qwen2, adds eos", "tekken"].map((label) =>
      JSON.stringify(variants[label]!.ids.map((ids) => ids.filter((id) => id !== 1 && id !== 2))),
    );
    expect(new Set(inner).size).toBe(4);
  });

  it("writes the files that transformers reads", () => {
    const { json, config, names } = filesOf();
    expect(names).toEqual([
      "tokenizer.json",
      "tokenizer_config.json",
      "special_tokens_map.json",
      "chat_template.jinja",
    ]);
    expect(config).toEqual({
      bos_token: "<|im_start|>",
      eos_token: "<|im_end|>",
      pad_token: "<pad>",
      unk_token: "<|endoftext|>",
      clean_up_tokenization_spaces: false,
      model_max_length: 512,
      tokenizer_class: "PreTrainedTokenizerFast",
    });
    expect((json.added_tokens as { content: string; special: boolean }[]).map((t) => [t.content, t.special])).toEqual([
      ["<|endoftext|>", true],
      ["<|im_start|>", true],
      ["<|im_end|>", true],
      ["<pad>", true],
      ["<think>", false],
      ["</think>", false],
    ]);
    expect(filesOf({ chat_template: undefined }).names).not.toContain("chat_template.jinja");
  });

  it("takes special tokens that are not marked as such, and does without those that are not named", () => {
    const { json, config } = filesOf({
      "ggml.token_type": undefined,
      "ggml.padding_token_id": 0xffffffff,
      "ggml.unknown_token_id": undefined,
      "ggml.bos_token_id": undefined,
      "ggml.add_bos_token": true,
    });
    expect((json.added_tokens as { id: number }[]).map(({ id }) => id)).toEqual([2]);
    expect(config).not.toHaveProperty("pad_token");
    expect(config).not.toHaveProperty("bos_token");
    expect(json.post_processor).toMatchObject({ special_tokens: {} });
  });

  it("keeps awkward tokens: number-like, __proto__, quotes, and whole ones outside the byte alphabet", () => {
    const tokens = metadata.get("tokenizer.ggml.tokens") as string[];
    const types = metadata.get("tokenizer.ggml.token_type") as Int32Array;
    const more = ["12345", "__proto__", '"\\', "<｜User｜>", "a b", "日"];
    const change: Change = {
      "ggml.tokens": [...tokens, ...more],
      "ggml.token_type": Int32Array.of(...types, 1, 1, 1, 4, 3, 1),
    };
    const { json, config } = filesOf(change);
    const vocab = (json.model as { vocab: Record<string, number> }).vocab;
    const at = (i: number): number => tokens.length + i;
    expect(Object.keys(vocab)).toHaveLength(tokens.length + more.length);
    expect(Object.hasOwn(vocab, "__proto__") && Object.getOwnPropertyDescriptor(vocab, "__proto__")?.value).toBe(at(1));
    expect(vocab["12345"]).toBe(at(0));
    expect(vocab['"\\']).toBe(at(2));
    // An ordinary token in plain text is spelled as the byte-level model sees it.
    expect(vocab).not.toHaveProperty("日");
    expect(vocab["æĹ¥"]).toBe(at(5));
    const tokenizer = new Tokenizer(json, config);
    expect(tokenizer.encode("<｜User｜>").ids).toEqual([at(3)]);
    expect(tokenizer.encode("a b").ids).toEqual([at(4)]);
    expect(tokenizer.encode("日").ids).not.toContain(at(3));
  });

  it("refuses other kinds, saying what to do", () => {
    const refused = (change: Change, message: RegExp): void => {
      expect(() => readGgufTokenizer(changed(change))).toThrow(UnsupportedError);
      expect(() => readGgufTokenizer(changed(change))).toThrow(message);
    };
    refused({ "ggml.model": "llama" }, /type 'llama' \(SentencePiece\).*copy the tokenizer files/);
    refused({ "ggml.model": "bert" }, /type 'bert' \(WordPiece\)/);
    refused({ "ggml.model": "constructor" }, /type 'constructor' is not supported/);
    refused({ "ggml.model": undefined }, /without a tokenizer/);
    refused({ "ggml.pre": "deepseek-v3" }, /pre-tokenizer 'deepseek-v3'.*smollm.*llama-bpe.*qwen2.*copy/);
    expect(readGgufTokenizer(changed({ "ggml.pre": undefined })).split).toBeNull();
  });

  it("refuses vocabularies that do not fit together", () => {
    const refused = (change: Change, message: RegExp): void => {
      expect(() => readGgufTokenizer(changed(change))).toThrow(FormatError);
      expect(() => readGgufTokenizer(changed(change))).toThrow(message);
    };
    refused({ "ggml.tokens": undefined }, /tokenizer.ggml.tokens is missing/);
    refused({ "ggml.tokens": Int32Array.of(1) }, /tokenizer.ggml.tokens: expected strings/);
    refused({ "ggml.tokens": ["a", 1] }, /tokenizer.ggml.tokens: expected strings/);
    refused({ "ggml.merges": undefined }, /tokenizer.ggml.merges is missing/);
    refused({ "ggml.merges": ["a b c"] }, /merges\[0\] is 'a b c', expected two tokens/);
    refused({ "ggml.merges": ["ab"] }, /expected two tokens/);
    refused({ "ggml.merges": ["a "] }, /expected two tokens/);
    refused({ "ggml.merges": ["~ ~~~~~"] }, /'~~~~~' is not in the vocabulary/);
    refused({ "ggml.token_type": Int32Array.of(1, 2) }, /token_type has 2 entries/);
    refused({ "ggml.eos_token_id": 100000 }, /eos_token has id 100000/);
    refused({ "ggml.eos_token_id": "2" }, /eos_token_id: expected integer/);
    refused({ "ggml.pre": 7 }, /ggml.pre: expected string/);
    refused({ "ggml.add_bos_token": 1 }, /add_bos_token: expected boolean/);
    refused({ chat_template: 1 }, /chat_template: expected string/);
  });
});
