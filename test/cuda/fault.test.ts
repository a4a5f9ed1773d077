import { expect, test } from "vitest";
import { onGpu, program, said } from "./gpu.js";

/** A kernel that reads at an address that is nobody's. */
const FAULT = `gpu.launch("convert", { x: NOWHERE, y, n: 1000, from: 1, to: 0 });`;
const START = `const gpu = new CudaBackend(); const y = Tensor.allocate(gpu, "f32", [1000]); fill(y, 1); await y.data();`;

onGpu("a kernel fault", () => {
  test("rejects pending reads with the kernel's name; the backend is dead and says so; the cpu goes on", () => {
    const ended = program(`${START}
      ${FAULT}
      const reads = [y.data(), y.slice(0, 3).data()];
      for (const read of reads) say(await attempt(() => read));
      say(gpu.state);
      say(await attempt(() => fill(y, 1)));
      say(await attempt(() => Tensor.allocate(gpu, "u8", [10])));
      say(await attempt(() => y.dataSync()));
      say(await attempt(() => y.data()));
      say(await attempt(() => gpu.synchronize()));
      say(await attempt(() => gpu.restart()));
      say(gpu.memory().bytes >= 4000);
      y.dispose();
      const cpu = new CpuBackend({ threads: 2 });
      const x = Tensor.allocate(cpu, "f32", [128]).copyFrom(new Float32Array(128).fill(2));
      say((await quantize4bit(x, { quantType: "nf4" })[0].data())[0]);
      await cpu.close();
      say(await attempt(() => gpu.close()));
      say(gpu.state);`);
    expect(ended.signal, ended.stderr).toBe(null);
    expect(ended.stderr).toBe("");
    expect(ended.code).toBe(0);
    const words = said(ended);
    const illegal = {
      name: "CudaError",
      code: "ERR_HALFBYTE_CUDA",
      status: "CUDA_ERROR_ILLEGAL_ADDRESS",
      message: expect.stringMatching(/\(700\).*convert\(x=0x1000, .*n=1000/),
    };
    expect(words.slice(0, 2)).toEqual([illegal, illegal]);
    expect(words[2]).toBe("failed");
    expect(words.slice(3, 8)).toEqual([illegal, illegal, illegal, illegal, illegal]);
    expect(words[8]).toMatchObject({ name: "BackendError", message: expect.stringMatching(/start the process again/) });
    expect(words.slice(9)).toEqual([true, 0xff, "no error", "closed"]);
  });

  test("is thrown by a blocking read as well", () => {
    const ended = program(`${START} ${FAULT} say(await attempt(() => y.dataSync())); say(gpu.state);`);
    expect([ended.code, ended.signal], ended.stderr).toEqual([0, null]);
    expect(said(ended)).toEqual([expect.objectContaining({ status: "CUDA_ERROR_ILLEGAL_ADDRESS" }), "failed"]);
  });

  test("that nobody awaits ends the process as an unhandled rejection, not as a crash", () => {
    const ended = program(`${START} ${FAULT} void y.data();`);
    expect([ended.code, ended.signal]).toEqual([1, null]);
    expect(ended.stderr).toMatch(/CudaError.*CUDA_ERROR_ILLEGAL_ADDRESS/);
  });

  test("is a typed error for a second backend of the process, too", () => {
    const ended = program(`${START}
      const other = new CudaBackend(); const z = Tensor.allocate(other, "f32", [1000]); fill(z, 2); await z.data();
      ${FAULT}
      say(await attempt(() => y.data()));
      say(await attempt(() => { fill(z, 3); return z.data(); }));
      say(await attempt(() => new CudaBackend()));
      await Promise.all([gpu.close(), other.close()]);
      say("closed");`);
    expect([ended.code, ended.signal], ended.stderr).toEqual([0, null]);
    const words = said(ended);
    expect(words[0]).toMatchObject({ status: "CUDA_ERROR_ILLEGAL_ADDRESS" });
    expect(words[1]).toMatchObject({ code: "ERR_HALFBYTE_CUDA" });
    expect(words[2]).toMatchObject({ code: expect.stringMatching(/^ERR_HALFBYTE_/) });
    expect(words[3]).toBe("closed");
  });

  test("leaves the GPU to the next process", () => {
    program(`${START} ${FAULT} await attempt(() => y.data());`);
    const ended = program(`${START} fill(y, 7); say((await y.bytes())[0]); await gpu.close();`);
    expect([ended.code, ended.stderr]).toEqual([0, ""]);
    expect(said(ended)).toEqual([7]);
  });
});
