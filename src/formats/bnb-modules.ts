/**
 * Which weights transformers + bitsandbytes hold quantized, decided from a checkpoint's names and shapes.
 *
 * transformers builds the model and replaces every `nn.Linear` (and GPT-2's `Conv1D`) but: the output head and tied
 * weights, the module of the very last parameter, modules its class wants in float32, and modules a skip pattern
 * matches. A checkpoint does not say which matrices belong to an `nn.Linear`, so names decide here: embeddings, routers
 * and the experts of mixtures (one fused parameter since transformers 5, no `nn.Linear` any more) are told apart by the
 * names that all of its model classes use, and the few classes that differ are listed. A loader decides the same way
 * again, from config.json, so a wrong guess does not load.
 */
import { ArgumentError, UnsupportedError } from "../core/errors.js";
import type { SourceTensor } from "./source.js";

const OP = "modulesToQuantize";
const WEIGHT = ".weight";

/** What happens to the tensors of a checkpoint. */
export interface ModulePlan {
  /** Names of the weights that are quantized, in the checkpoint's order. */
  readonly quantize: readonly string[];
  /** Those of them stored [in, out] (`Conv1D`): transposed before they are quantized, written as [out, in]. */
  readonly transposed: ReadonlySet<string>;
  /** Two-dimensional weights that stay, with the reason. */
  readonly kept: ReadonlyMap<string, string>;
  /** `llm_int8_skip_modules` for config.json: null where transformers comes to the same decision by itself. */
  readonly skipModules: readonly string[] | null;
}

/** Last parts of module names that are embeddings. */
const EMBEDDING =
  /^(shared|wte|wpe|relative_attention_bias|embed_(tokens|positions|in|global)\w*|\w*Embedder_\d+)$|(^|_)emb(ed(ding)?s?)?(_\d+)?$/;
/** The output projection inside `nn.MultiheadAttention`, of a class of its own (SigLIP's pooling head has one). */
const TORCH_ATTENTION = /(^|\.)(head\.attention|multihead_attn)\.out_proj$/;
/** Linear layers whose names sound like embeddings. */
const LINEAR_EMBEDDING = /^(box_linear_embeddings|xpath_unitseq\w*_embeddings|relative_pos_embeddings)$/;
/** An expert of a mixture, one weight matrix per expert. */
const EXPERT = /(^|\.)experts\.\d+\./;
/** What chooses the experts. */
const ROUTER = /(^|\.)((mlp|ffn|block_sparse_moe|mixer|router|feed_forward|moe)\.(gate|router)|router\.layer|router)$/;

/** Output heads: what `get_output_embeddings()` gives, at the end of a name or as the whole of it. */
const HEADS = [
  /(^|\.)(lm_head|lm_head\.decoder|predictions\.decoder|generator_lm_head|lm_loss|pred_layer\.proj)$/,
  /(^|\.)(embed_out|output_projection|unembed)$/,
  /^(proj_out|head|head\.decoder|output|decoder|cls)$/,
];
/** Heads of classifiers, which are the model's last parameter unless they have a bias. */
const CLASSIFIER = /^(score|classifier)$/;

/** Model types whose checkpoints hold matrices that transformers splits or joins while it loads them. */
const REARRANGED = new Set(["gte", "hrm_text", "jina_embeddings_v3", "nomic_bert"]);

interface Peculiarities {
  /** Modules that are no plain `nn.Linear`. */
  readonly notLinear?: RegExp;
  /** Modules that are one although the general rules say otherwise. */
  readonly linear?: RegExp;
  /** `Conv1D` modules. */
  readonly conv1d?: RegExp;
  /** `_keep_in_fp32_modules` of the class, as skip patterns. */
  readonly keepInFloat32?: readonly string[];
  /** The last parameter of a model with tied embeddings whose final norm has none: this module of the last layer. */
  readonly lastModule?: RegExp;
}

const CONV1D = /(^|\.)(c_attn|c_proj|c_fc|q_attn)$/;
const T5: Peculiarities = { keepInFloat32: ["wo"] };
const SPARSE_INDEXER: Peculiarities = { keepInFloat32: ["indexer.weights_proj"] };

/** By `model_type`. */
const PECULIARITIES: Readonly<Record<string, Peculiarities>> = {
  afmoe: { linear: /\.router\.gate$/ },
  axk2: SPARSE_INDEXER,
  "blip-2": { keepInFloat32: ["query_tokens", "qformer"] },
  clvp: { conv1d: CONV1D },
  ctrl: { notLinear: /^(transformer\.)?w$/ },
  decision_transformer: { conv1d: CONV1D },
  deepseek_v32: SPARSE_INDEXER,
  deepseek_v4: { notLinear: /\.wo_a$|\.compressor\.(wgate|wkv)$|\.indexer\.weights_proj$/ },
  // Its linear layers are of a class of their own.
  falcon: { notLinear: /(^|\.)(self_attention|mlp)\./ },
  glm_moe_dsa: SPARSE_INDEXER,
  "gpt-sw3": { conv1d: CONV1D },
  gpt2: { conv1d: CONV1D },
  ibert: { notLinear: /(^|\.)encoder\.layer\./ },
  imagegpt: { conv1d: CONV1D },
  jetmoe: { linear: /\.router\.layer$/ },
  mistral_large4: SPARSE_INDEXER,
  mobilebert: { notLinear: /\.predictions\.dense$/ },
  mt5: T5,
  phi4_multimodal: { notLinear: /\.bias_values$/ },
  nanochat: { lastModule: /\.mlp\.fc2$/ },
  olmo: { lastModule: /\.mlp\.down_proj$/ },
  "openai-gpt": { conv1d: CONV1D },
  pop2piano: T5,
  t5: T5,
  udop: T5,
  umt5: T5,
};

/**
 * Decides which weights of a checkpoint are quantized.
 * @param config config.json: `model_type` and `tie_word_embeddings` are read
 * @param tensors names and shapes
 * @param skip further modules to leave alone, as `llm_int8_skip_modules`: a name, the end of a name, or a regular
 * expression that matches from the start of the name up to a dot or its end. Unlike there, the output head stays even
 * if no pattern names it.
 * @throws ArgumentError for a pattern that is no regular expression, UnsupportedError for a model type whose
 * checkpoints are laid out differently from its modules
 */
export function modulesToQuantize(
  config: Readonly<Record<string, unknown>>,
  tensors: ReadonlyMap<string, Pick<SourceTensor, "shape">>,
  skip: readonly string[] = [],
): ModulePlan {
  const type = typeof config.model_type === "string" ? config.model_type : "";
  if (REARRANGED.has(type)) {
    const why =
      "transformers rearranges the matrices of its checkpoints while loading, so they cannot be quantized one by one";
    throw new UnsupportedError(`model type ${JSON.stringify(type)}`, why);
  }
  const own: Peculiarities = Object.hasOwn(PECULIARITIES, type) ? PECULIARITIES[type]! : {};
  const isSkipped = skipMatcher(skip);
  const isFloat32 = skipMatcher(own.keepInFloat32 ?? []);
  const last = config.tie_word_embeddings === true ? lastOf(tensors, own.lastModule) : undefined;

  const quantize: string[] = [];
  const transposed = new Set<string>();
  const kept = new Map<string, string>();
  const skipModules = new Set<string>();
  for (const [name, { shape }] of tensors) {
    if (!name.endsWith(WEIGHT) || shape.length !== 2) continue;
    const module = name.slice(0, -WEIGHT.length);
    const isHead =
      HEADS.some((head) => head.test(module)) ||
      (CLASSIFIER.test(module) && !tensors.has(`${module}.bias`)) ||
      name === last;
    const reason = isHead
      ? "output head"
      : (whyNotLinear(module, own) ?? (isFloat32(module) ? "kept in float32" : undefined));
    if (isHead) skipModules.add(module);
    if (reason !== undefined || isSkipped(module)) {
      kept.set(name, reason ?? "skipped on request");
      continue;
    }
    quantize.push(name);
    if (own.conv1d?.test(module)) transposed.add(name);
  }
  // A tied head is a module of the model even where the checkpoint has no tensor for it.
  const defaults = skipModules.size > 0 ? [...skipModules] : ["lm_head"];
  return { quantize, transposed, kept, skipModules: skip.length > 0 ? [...new Set([...defaults, ...skip])] : null };
}

function whyNotLinear(module: string, own: Peculiarities): string | undefined {
  if (own.linear?.test(module)) return undefined;
  if (own.notLinear?.test(module) || TORCH_ATTENTION.test(module)) return "not a plain linear layer in transformers";
  const parts = module.split(".");
  const last = parts.at(-1)!;
  const label = /^\d+$/.test(last) ? (parts.at(-2) ?? "") : last;
  if (EMBEDDING.test(label) && !LINEAR_EMBEDDING.test(label)) return "embedding";
  if (EXPERT.test(module)) return "expert of a mixture";
  return ROUTER.test(module) ? "router of a mixture" : undefined;
}

/** The weight of the last layer's module that `pattern` names. */
function lastOf(tensors: ReadonlyMap<string, unknown>, pattern: RegExp | undefined): string | undefined {
  if (!pattern) return undefined;
  const layer = (name: string) => Number(/\.(\d+)\./.exec(name)?.[1] ?? -1);
  let last: string | undefined;
  for (const name of tensors.keys()) {
    const matches = name.endsWith(WEIGHT) && pattern.test(name.slice(0, -WEIGHT.length));
    if (matches && (last === undefined || layer(name) > layer(last))) last = name;
  }
  return last;
}

/** Python's regular expressions that JavaScript reads differently or not at all. */
const PYTHON_ONLY = /\\[AZ]|\(\?(P|#|[a-zA-Z]+[-:)])/;

/**
 * Whether a module's name is matched by one of the patterns: a suffix of the name, or a regular expression that matches
 * from its start up to a dot or its end ("layers.1" matches "layers.1.mlp", not "layers.11.mlp").
 * @throws ArgumentError for an empty pattern (it would match everything) and for one that is no regular expression
 */
export function skipMatcher(patterns: readonly string[]): (module: string) => boolean {
  const compiled = patterns.map((pattern) => {
    const problem = (expected: string) => new ArgumentError(OP, "skip pattern", expected, JSON.stringify(pattern));
    if (pattern === "") throw problem("a module name or regular expression");
    if (PYTHON_ONLY.test(pattern)) throw problem("a regular expression that JavaScript and Python read alike");
    try {
      return { pattern, regex: new RegExp(`^(?:${pattern})(?:(?<=\\.)|(?=\\.|$))`) };
    } catch {
      throw problem("a module name or regular expression");
    }
  });
  return (module) => compiled.some(({ pattern, regex }) => regex.test(module) || module.endsWith(pattern));
}
