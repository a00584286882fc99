"""Compile every kernel that a call launches, for a Hopper GPU on a machine without one, as it is launched; in a process of its own, as this one interprets."""

import json
import os
import subprocess
import sys

from tests.kernels.compiling import used


def launched(module, *arguments):
    """Run `launches` of a test module, and return what the kernels that it launches take, each with its name and the index of its call."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-m", __name__, module, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(module, *arguments):
    from importlib import import_module

    from triton.runtime.jit import JITFunction

    found = {}

    def note(self, *given, grid, warmup, **options):
        found.setdefault(str((self.__name__, [kind(value) for value in given], options)), (self, given, options, current))

    JITFunction.run = note
    for current, call in enumerate(import_module(module).launches(*arguments)):  # noqa: B007
        call()
    for kernel, given, options, index in found.values():
        print(json.dumps({"kernel": kernel.__name__, "call": index, **facts(kernel, given, dict(options))}), flush=True)


def kind(value):
    """Return what triton compiles an argument for: its type, and whether it is a multiple of 16."""
    if isinstance(value, int):
        return "i32", value % 16 == 0
    types = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "u8", "int32": "i32", "int64": "i64"}
    return "*" + types[str(value.dtype).removeprefix("torch.")], True


def facts(kernel, given, options):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    how = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    kinds = dict(zip(kernel.arg_names, map(kind, given), strict=False))
    ones = {name for name, value in zip(kernel.arg_names, given, strict=False) if isinstance(value, int) and value == 1}
    free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    fixed = {**options, **dict.fromkeys(ones - free, 1)}
    signature = {name: "constexpr" if name in fixed else kinds[name][0] for name in kernel.arg_names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if name not in {*fixed, *free} and kinds[name][1]}
    made = triton.compile(ASTSource(kernel, signature, fixed, aligned), target=GPUTarget("cuda", 90, 32), options=how)
    code = made.asm["ptx"]
    counts = {"wgmma": code.count("wgmma.mma_async"), "mma": code.count("mma.sync.aligned"), "copies": "cp.async.cg.shared.global" in code}
    return {"shared": made.metadata.shared, **how, **counts, **used(made), "floating": "fma.rn.f32" in code}


if __name__ == "__main__":
    main(*sys.argv[1:])
