import { expect, test } from "vitest";
import { onGpu, program, said } from "./gpu.js";

const START = `const gpu = new CudaBackend(); const x = Tensor.allocate(gpu, "f32", [1 << 24]); fill(x, 0);`;

onGpu("the end of a process", () => {
  test("comes by itself after a read", () => {
    const ended = program(`${START} say((await x.data()).length);`);
    expect([ended.code, ended.signal, said(ended)], ended.stderr).toEqual([0, null, [1 << 24]]);
  });

  test("waits for a read that nobody awaits", () => {
    const ended = program(`${START} for (let i = 0; i < 200; i++) quantize4bit(x)[0].dispose();
      quantize4bit(x)[0].data().then((d) => say(d.length));`);
    expect([ended.code, ended.signal, said(ended)], ended.stderr).toEqual([0, null, [1 << 23]]);
  });

  test("does not wait for kernels that nobody reads", () => {
    const ended = program(`${START} for (let i = 0; i < 500; i++) quantize4bit(x)[0].dispose(); say("done");`);
    expect([ended.code, ended.signal, said(ended)], ended.stderr).toEqual([0, null, ["done"]]);
  });

  test("process.exit in the middle of kernels and pending reads is an exit", () => {
    const ended = program(`${START} for (let i = 0; i < 500; i++) quantize4bit(x)[0].dispose();
      for (let i = 0; i < 20; i++) void x.data(); say("going"); process.exit(7);`);
    expect([ended.code, ended.signal, said(ended)], ended.stderr).toEqual([7, null, ["going"]]);
  });

  test("an exception in the middle of kernels is that exception", () => {
    const ended = program(`${START} for (let i = 0; i < 500; i++) quantize4bit(x)[0].dispose();
      for (let i = 0; i < 5; i++) void x.data(); throw new Error("mine");`);
    expect([ended.code, ended.signal]).toEqual([1, null]);
    expect(ended.stderr).toMatch(/Error: mine/);
  });

  test("close rejects pending reads and everything after it, and the process ends", () => {
    const ended = program(`${START} for (let i = 0; i < 300; i++) quantize4bit(x)[0].dispose();
      const reads = [x.data(), x.slice(0, 5).data(), gpu.synchronize()].map((read) => attempt(() => read));
      const closing = gpu.close();
      for (const read of reads) say(await read);
      await closing;
      say(gpu.state);
      say(await attempt(() => fill(x, 1)));
      say(await attempt(() => x.data()));
      x.dispose();
      await gpu.close();`);
    expect([ended.code, ended.signal], ended.stderr).toEqual([0, null]);
    const closed = expect.objectContaining({ name: "BackendError", message: expect.stringMatching(/was closed/) });
    const disposed = expect.objectContaining({ name: "DisposedError" });
    expect(said(ended)).toEqual([closed, closed, closed, "closed", disposed, disposed]);
  });

  test("a worker thread is refused by name, and the main thread works on", () => {
    const ended = program(`${START}
      import { Worker } from "node:worker_threads";
      const worker = new Worker(\`
        import("node:worker_threads").then(async ({ parentPort }) => {
          const { tensor } = await import("\${import.meta.resolve("halfbyte")}");
          try {
            tensor([1], { device: "cuda" });
            parentPort.postMessage("worked");
          } catch (error) {
            parentPort.postMessage({ name: error.name, reason: error.reason });
          }
        });
      \`, { eval: true, execArgv: [] });
      say(await new Promise((resolve, reject) => worker.once("message", resolve).once("error", reject)));
      await worker.terminate();
      say((await x.slice(0, 2).data()).length);
      await gpu.close();`);
    expect([ended.code, ended.signal], ended.stderr).toEqual([0, null]);
    expect(said(ended)).toEqual([{ name: "CudaUnavailableError", reason: "worker-thread" }, 2]);
  });
});
