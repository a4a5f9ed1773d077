import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { liveAfter } from "../helpers/backends.js";
import { compareModels } from "#halfbyte/checkpoint/compare.js";
import { inspectModel } from "#halfbyte/checkpoint/inspect.js";
import { type QuantizeOptions, quantizeModel } from "#halfbyte/checkpoint/quantize.js";
