#!/usr/bin/env node
/** The `halfbyte` command: exit 0 when it worked, 1 when it failed, 2 when the command line is wrong, 130 on Ctrl-C. */
import { Command, CommanderError } from "commander";
import { HalfbyteError } from "../core/errors.js";
import { VERSION } from "../core/version.js";
import { registerCompare } from "./compare.js";
import { registerDoctor } from "./doctor.js";
import { registerEstimate } from "./estimate.js";
import { registerGolden } from "./golden.js";
import { registerInspect } from "./inspect.js";
import { describeError, EXIT_FAILURE, EXIT_USAGE, printJson } from "./output.js";
import { registerQuantize } from "./quantize.js";
import { Interrupted } from "./signals.js";

/** What commander reports by throwing although nothing is wrong. */
const HARMLESS = ["commander.helpDisplayed", "commander.version"];

function createProgram(complaints: string[]): Command {
  const program = new Command("halfbyte")
    .description("8-bit and 4-bit quantization of language models, as bitsandbytes does it")
    .version(VERSION, "--version", "print the version")
    .helpOption("-h, --help", "print help")
    .helpCommand("help [COMMAND]", "print help of a command")
    .exitOverride()
    // Complaints are collected: with --json they belong into the object on standard output.
    .configureOutput({ writeErr: (text) => void complaints.push(text) });
  for (const register of [
    registerQuantize,
    registerInspect,
    registerCompare,
    registerEstimate,
    registerGolden,
    registerDoctor,
  ])
    register(program);
  return program;
}

async function main(args: readonly string[]): Promise<void> {
  const end = args.indexOf("--");
  const json = (end < 0 ? args : args.slice(0, end)).includes("--json");
  const complaints: string[] = [];
  try {
    await createProgram(complaints).parseAsync(args, { from: "user" });
  } catch (error) {
    process.exitCode = report(error, complaints.join(""), json);
  }
}

/** Says what went wrong and gives the exit code. */
function report(error: unknown, complaints: string, json: boolean): number {
  if (error instanceof CommanderError) {
    if (HARMLESS.includes(error.code)) return 0;
    const message = complaints
      .trim()
      .replace(/^error: /, "")
      .replace("\n(", " (");
    // Without a command there is only the help to show.
    if (json) printJson({ error: { code: "ERR_USAGE", message } });
    else process.stderr.write(error.code === "commander.help" ? complaints : `halfbyte: ${message}\n`);
    return EXIT_USAGE;
  }
  if (error instanceof Interrupted) {
    if (json) printJson({ error: { code: "ERR_INTERRUPTED", message: error.message } });
    else process.stderr.write(`halfbyte: ${error.message}, nothing is left of it\n`);
    return error.exitCode;
  }
  const described = describeError(error);
  if (json) printJson({ error: described });
  else process.stderr.write(`halfbyte: ${described.message}\n`);
  const expected = error instanceof HalfbyteError || (error instanceof Error && "syscall" in error);
  if (process.env.HALFBYTE_DEBUG && error instanceof Error) process.stderr.write(`${error.stack}\n`);
  else if (!expected && !json) process.stderr.write("halfbyte: this is a bug; HALFBYTE_DEBUG=1 shows where\n");
  return EXIT_FAILURE;
}

// Whoever reads the output may have seen enough (`| head`).
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  if (error.code !== "EPIPE") throw error;
  process.exit();
});
await main(process.argv.slice(2));
