/** The part of `halfbyte doctor` that is about the GPU: what was found, what works, and what to do by the cause of a failure. */
import { CudaBackend, kernelFolder } from "../backend/cuda/backend.js";
import { architectureName, cudaVersionName, type KernelImage, listImages, targetName } from "../backend/cuda/images.js";
import { type ProbeResult, probeCuda } from "../backend/cuda/probe.js";
import { findTraces } from "../backend/cuda/traces.js";
import { shutdown } from "../backend/devices.js";
import type { Jetson } from "../backend/jetson.js";
import type { Backend } from "../core/backend.js";
import type { CudaUnavailableCause } from "../core/errors.js";
import { CudaError } from "../core/errors.js";
import {
  type Check,
  checkKernel,
  describeLatency,
  describeMemory,
  info,
  type Latency,
  measureLatency,
  result,
} from "./doctor-checks.js";
import { useDevice } from "./options.js";
import { describeError, formatBytes } from "./output.js";

/** What to do about a status of the driver, by its number. docs/jetson.md has the same list. */
export const STATUS_ADVICE: Readonly<Record<number, { readonly name: string; readonly advice: string }>> = {
  2: {
    name: "CUDA_ERROR_OUT_OF_MEMORY",
    advice:
      "free memory: halfbyte estimate says what a model needs; on a Jetson stop the desktop (sudo systemctl isolate multi-user.target)",
  },
  35: {
    name: "CUDA_ERROR_INSUFFICIENT_DRIVER",
    advice: "update the driver to one for CUDA 11.4 or later (on a Jetson: JetPack 5 or later)",
  },
  46: { name: "CUDA_ERROR_DEVICE_UNAVAILABLE", advice: "end the program that holds the GPU for itself" },
  100: {
    name: "CUDA_ERROR_NO_DEVICE",
    advice:
      "see what CUDA_VISIBLE_DEVICES says, and whether this user may open the device nodes (groups video and render)",
  },
  209: {
    name: "CUDA_ERROR_NO_BINARY_FOR_GPU",
    advice: "this version has no kernels for this GPU: install a newer one, or build them (npm run build:kernels)",
  },
  221: {
    name: "CUDA_ERROR_JIT_COMPILER_NOT_FOUND",
    advice: "install the driver's PTX compiler (libnvidia-ptxjitcompiler), which came with the driver",
  },
  222: {
    name: "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    advice: "update the driver: it cannot compile PTX of this CUDA, and there is no SASS for this GPU",
  },
  700: {
    name: "CUDA_ERROR_ILLEGAL_ADDRESS",
    advice:
      "a kernel went wrong and the GPU's context is lost: restart the program, and report the kernel that the error names",
  },
  702: {
    name: "CUDA_ERROR_LAUNCH_TIMEOUT",
    advice:
      "a kernel ran longer than the system allows: raise the power mode (nvpmodel), or use a GPU without a display",
  },
  719: {
    name: "CUDA_ERROR_LAUNCH_FAILED",
    advice: "the GPU's context is lost: restart the program; look at dmesg for the GPU's own words",
  },
  801: {
    name: "CUDA_ERROR_NOT_SUPPORTED",
    advice: "the driver does not do this on this GPU; report it with the output of halfbyte doctor --json",
  },
  803: {
    name: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    advice:
      "the driver's library and its kernel module are of different versions: reboot, or in a container use the host's library (no cuda-compat)",
  },
  804: {
    name: "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
    advice: "a cuda-compat library is in use that this GPU does not take: remove it from LD_LIBRARY_PATH",
  },
  999: {
    name: "CUDA_ERROR_UNKNOWN",
    advice: "look at dmesg; on a Jetson see that nvgpu is loaded and its nodes may be opened, then reboot",
  },
};

/** What was found about cuda, for `--json`. */
export interface CudaDiagnosis {
  /** null when it could not be asked. */
  readonly probe: ProbeResult | null;
  /** Everything that the package has code for. */
  readonly images: readonly Pick<KernelImage, "family" | "kind" | "architecture" | "compiler">[];
  readonly latency?: Latency;
}

/** The circumstances that say how bad a missing GPU is, and what to do. */
export interface Circumstances {
  /** The user asked for cuda. */
  readonly wanted: boolean;
  readonly jetson: Jetson;
  /** There is a sign that a GPU should be here. */
  readonly expected: boolean;
}

/** Reasons that are none to worry about where nothing points to a GPU. */
const ABSENT: readonly CudaUnavailableCause[] = ["platform", "no-driver", "no-device", "addon-missing"];

/** Probes the GPU in a process of its own, and when that works uses it in this one. */
export async function diagnoseCuda(wanted: boolean, jetson: Jetson): Promise<{ checks: Check[]; cuda: CudaDiagnosis }> {
  const expected = jetson.isJetson || findTraces().gpu || Boolean(process.env.HALFBYTE_CUDA_LIBRARY);
  const images = shippedImages();
  let probe: ProbeResult;
  try {
    probe = await probeCuda({ fresh: true });
  } catch (error) {
    const check = result("cuda", false, describeError(error).message, "correct it, or leave it out");
    return { checks: [check], cuda: { probe: null, images } };
  }
  const checks = probeChecks(probe, images, { wanted, jetson, expected });
  const cuda = { probe, images };
  if (!probe.ok) return { checks, cuda };
  try {
    const backend = await useDevice({ device: "cuda" });
    const { checks: used, latency } = await useBackend(backend);
    return { checks: [...checks, ...used], cuda: { ...cuda, latency } };
  } catch (error) {
    return {
      checks: [...checks, result("cuda kernel", false, describeError(error).message, errorAdvice(error))],
      cuda,
    };
  } finally {
    await shutdown();
  }
}

async function useBackend(backend: Backend): Promise<{ checks: Check[]; latency: Latency }> {
  const kernel = await checkKernel(backend);
  const latency = await measureLatency(backend);
  const blas = backend instanceof CudaBackend ? [describeBlas(backend)] : [];
  return { checks: [kernel, ...blas, describeLatency(backend, latency), describeMemory(backend)], latency };
}

/** Which cuBLASLt multiplies matrices, or why none does. */
export function describeBlas(backend: Pick<CudaBackend, "blasVersion" | "blasMissing">): Check {
  const version = backend.blasVersion();
  return info("cuda products", version ? `cuBLASLt ${version}` : `own kernels, no cuBLASLt: ${backend.blasMissing()}`);
}

/** A package whose manifest cannot be read is reported by the probe. */
function shippedImages(): CudaDiagnosis["images"] {
  try {
    return listImages(kernelFolder()).map(({ family, kind, architecture, compiler }) => ({
      family,
      kind,
      architecture,
      compiler,
    }));
  } catch {
    return [];
  }
}

/** What a probe's result means to whoever sits before this machine. */
export function probeChecks(
  probe: ProbeResult,
  images: CudaDiagnosis["images"],
  circumstances: Circumstances,
): Check[] {
  const { wanted, jetson, expected } = circumstances;
  const { device } = probe;
  const found: Check[] = [];
  if (device) {
    const { name, architecture, multiprocessors, driverVersion, integrated, totalBytes } = device;
    const memory = integrated ? "shares the machine's memory" : `${formatBytes(totalBytes)} of memory`;
    const words = [name, architectureName(architecture), `${multiprocessors} multiprocessors`, memory];
    found.push(info("cuda gpu", [...words, `driver for CUDA ${cudaVersionName(driverVersion)}`].join(", ")));
  }
  if (probe.ok) {
    found.push(info("cuda images", probe.images.join("; ")));
    const odd = jetson.architecture !== undefined && jetson.architecture !== probe.device.architecture;
    const board =
      odd && probe.device.integrated ? `; the board's chip should have ${architectureName(jetson.architecture)}` : "";
    const time = `${probe.milliseconds.toFixed(0)} ms`;
    return [
      ...found,
      result(
        "cuda probe",
        true,
        `kernels ran in a process of their own and their numbers are right (${time})${board}`,
        "",
      ),
    ];
  }
  const { reason, detail } = probe;
  if (!wanted && !expected && ABSENT.includes(reason))
    return [...found, info("cuda", `not here, cpu is used: ${detail}`)];
  const targets = [...new Set(images.map(targetName))].join(", ");
  if (reason === "no-kernel-image") found.push(info("cuda images", `the package has code for ${targets || "no GPU"}`));
  return [...found, result("cuda", false, `${reason}: ${detail}`, adviceFor(probe, jetson))];
}

/** One line of advice by the cause, and by what this machine is. */
export function adviceFor(
  { reason, detail, advice }: Extract<ProbeResult, { ok: false }>,
  jetson: Jetson,
  library = process.env.HALFBYTE_CUDA_LIBRARY,
): string {
  if (library && reason === "no-driver") {
    return "HALFBYTE_CUDA_LIBRARY names a file that cannot be used as the driver: correct it, or leave it out";
  }
  if (jetson.isJetson) {
    const series = Number(jetson.l4t?.split(".")[0] ?? Number.NaN);
    if (series <= 32) {
      return "JetPack 4 is older than what the kernels and Node.js 20 need: update a Xavier to JetPack 5; a TX2 or Nano has no newer one, use device: cpu";
    }
    if (["no-driver", "no-device", "driver-error"].includes(reason)) {
      if (!jetson.gpuNodes) {
        return jetson.container
          ? "start the container with NVIDIA's runtime (docker run --runtime nvidia): the GPU's device nodes (/dev/nvhost-*, /dev/nvgpu) are not in it"
          : "the GPU's device nodes (/dev/nvhost-*, /dev/nvgpu) are missing: see that the nvgpu kernel module is loaded, and that the kernel is L4T's own";
      }
      if (reason === "no-driver") {
        return jetson.container
          ? "the GPU's nodes are here but not its driver library: start the container with --runtime nvidia, which mounts it"
          : "install the driver library of L4T (sudo apt install nvidia-l4t-cuda)";
      }
    }
  } else if (jetson.container && ["no-driver", "no-device"].includes(reason)) {
    return "start the container with the GPU (docker run --gpus all, with the NVIDIA container toolkit on the host)";
  }
  const status = /\bCUDA_ERROR_\w+ \((\d+)\)/.exec(detail)?.[1];
  const known = reason === "driver-error" && status !== undefined ? STATUS_ADVICE[Number(status)] : undefined;
  return known?.advice ?? advice;
}

function errorAdvice(error: unknown): string {
  const known = error instanceof CudaError ? STATUS_ADVICE[error.status] : undefined;
  return (
    known?.advice ??
    "the probe worked but this process cannot use the GPU: report it with the output of halfbyte doctor --json"
  );
}
