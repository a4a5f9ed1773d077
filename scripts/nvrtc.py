"""Compiles one CUDA source with NVRTC. Reads a job as JSON from standard input, answers with JSON on standard output.

Job: library (path of libnvrtc), builtins (path of libnvrtc-builtins, loaded first, so that NVRTC finds it wherever it lies),
name, source, headers (name to content), options, kind ("cubin" or "ptx"), output (path, written only on success).
Answer: ok, log (the compiler's), error (what else failed), milliseconds, version.
"""

import ctypes
import json
import os
import sys
import time


class NvrtcError(Exception):
    pass


class Nvrtc:
    """The few functions of the library that are needed, with their statuses checked."""

    def __init__(self, library, builtins):
        ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(library)
        self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, function, *args):
        status = getattr(self.lib, function)(*args)
        if status != 0:
            words = self.lib.nvrtcGetErrorString(status).decode()
            raise NvrtcError(f"{function}: {words} ({status})")

    def version(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def bytes_of(self, program, what):
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, job):
        """The image, or None; and the compiler's log."""
        program = ctypes.c_void_p()
        headers = job["headers"]
        self.call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            job["source"].encode(),
            job["name"].encode(),
            len(headers),
            strings(headers.values()),
            strings(headers.keys()),
        )
        try:
            options = job["options"]
            status = self.lib.nvrtcCompileProgram(program, len(options), strings(options))
            log = self.bytes_of(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if status != 0:
                words = self.lib.nvrtcGetErrorString(status).decode()
                return None, f"{log}\nnvrtcCompileProgram: {words} ({status})".strip()
            # PTX comes with the zero that ends a C string, which no file should have.
            image = self.bytes_of(program, "CUBIN") if job["kind"] == "cubin" else self.bytes_of(program, "PTX").rstrip(b"\0")
            return image, log
        finally:
            self.lib.nvrtcDestroyProgram(ctypes.byref(program))


def strings(texts):
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def run(job):
    nvrtc = Nvrtc(job["library"], job["builtins"])
    start = time.monotonic()
    image, log = nvrtc.compile(job)
    answer = {"milliseconds": round((time.monotonic() - start) * 1000), "version": nvrtc.version(), "log": log}
    if image is None:
        return {**answer, "ok": False}
    beside = f"{job['output']}.{os.getpid()}.tmp"
    with open(beside, "wb") as file:
        file.write(image)
    os.replace(beside, job["output"])
    return {**answer, "ok": True}


def main():
    try:
        answer = run(json.load(sys.stdin))
    except (NvrtcError, OSError, AttributeError) as error:
        answer = {"ok": False, "log": "", "error": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
