/** The host's part of a step on the cuda backend over the fake driver: kernels do nothing there, everything else is real. */
import { describe, expect, test } from "vitest";
import { Tensor } from "#halfbyte/core/tensor.js";
import { PagedAdam8bit, PagedLAMB } from "#halfbyte/index.js";
import { HERE, withCuda } from "../helpers/fake-backend.js";
import { dispose, disposeDict, dropGradients, parameter, setGradients } from "./scene.js";

describe.skipIf(!HERE)("paged optimizers on the cuda backend", () => {
  test.each([PagedAdam8bit, PagedLAMB])("steps, states and dicts leave nothing behind", async (make) => {
    await withCuda({}, async (backend) => {
      const params = [parameter(backend, [300_000], 1), parameter(backend, [64], 2), parameter(backend, [0], 3)];
      const optimizer = new make(params);
      for (let step = 1; step <= 20; step++) {
        setGradients(params, step);
        optimizer.step();
      }
      expect(await optimizer.skippedSteps()).toBe(0);
      const dict = optimizer.stateDict();
      expect(dict.state[0]!.step).toBe(20);
      expect(dict.state[0]!.state1).toBeInstanceOf(Tensor);
      optimizer.loadStateDict(dict);
      disposeDict(dict);
      optimizer.zeroGrad();
      dropGradients(params);
      dispose([optimizer], params);
    });
  });
});
