#!/usr/bin/env python3
"""Registers, spills and shared memory of every GPU kernel, as a table: no GPU needed, but NVRTC and ptxas (CUDA 13).

    REHEARSAL_NVRTC=.../libnvrtc.so.13 PATH=$CUDA_HOME/bin:$PATH scripts/gpu/resources.py [sm_90]
"""
import ctypes, glob, os, re, subprocess, sys, tempfile

root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
library = os.environ.get("REHEARSAL_NVRTC", "libnvrtc.so.13")
for builtins in glob.glob(os.path.join(os.path.dirname(library), "libnvrtc-builtins.so.*")):
    ctypes.CDLL(builtins, ctypes.RTLD_GLOBAL)
nvrtc = ctypes.CDLL(library)


def ptx(text, options):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None) == 0
    arguments = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if status:
        sys.exit(log.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    found = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, found)
    return found.value


def resources(code, card, registers_max):
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(code)
        file.flush()
        command = ["ptxas", "-v", f"-arch={card}", "-o", "/dev/null", file.name]
        if registers_max:
            command.insert(1, f"--maxrregcount={registers_max}")
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(.*?)\n", re.S)
    for name, _, stores, loads, registers, rest in entry.findall(said):
        shared = re.search(r"(\d+) bytes smem", rest)
        yield name, int(registers), int(stores) + int(loads), int(shared.group(1)) if shared else 0


def main():
    card = sys.argv[1] if len(sys.argv) > 1 else "sm_90"
    sources = os.path.join(root, "kernels/src/gpu/sources")
    common = open(os.path.join(sources, "common.cuh")).read()
    files = [(name, os.path.join(sources, name + ".cu")) for name in ("rows", "head", "attention", "decode", "sample")]
    files.append(("adamw", os.path.join(root, "learn/src/adamw/adamw.cu")))
    print(f"| kernel | type | head | registers | bytes spilled | static shared memory |\n|---|---|---|---|---|---|")
    for name, path in files:
        per_head = name in ("attention", "decode")
        for element in ("bf16", "float") if name != "adamw" else ("float",):
            for dim in (64, 128, 256) if per_head else (1,):
                text = f"#define NARROW {element}\n#define DIM {dim}\n{common}\n{open(path).read()}"
                limit = 64 if name == "sample" else None
                code = ptx(text, [f"--gpu-architecture=compute_{card[3:]}", "--std=c++17"])
                for kernel, registers, spilled, shared in resources(code, card, limit):
                    print(f"| {kernel} | {element} | {dim if per_head else ''} | {registers} | {spilled} | {shared} |")


main()
