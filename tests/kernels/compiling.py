"""Compile kernels for a Hopper GPU on a machine without one, in a process of its own, as this one interprets them."""

import json
import os
import subprocess
import sys

SHARED = 232_448  # bytes of shared memory that a block of threads may have on sm_90


def compiled(cases):
    """Compile each case, and return what it takes: shared memory, registers, stack, whether it moves 16 bytes at a time, and how it multiplies.

    A case has the kernel as module:name, the types of arguments, constants, which arguments are multiples of 16 (by name), warps, and maybe the stages of
    the pipeline.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, __file__, json.dumps(cases)], capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def used(made):
    """Return the registers and the stack of a compiled kernel, by the tool that comes with triton."""
    import re
    from pathlib import Path
    from tempfile import TemporaryDirectory

    import triton

    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1])}


def main(cases):
    from importlib import import_module

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"fp32": tl.float32}
    for case in cases:
        module, _, name = case["kernel"].partition(":")
        function = getattr(import_module(module), name)
        fixed = {key: types.get(value, value) for key, value in case["fixed"].items()}
        aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in case["aligned"]}
        signature = {name: case["signature"].get(name, "constexpr") for name in function.arg_names}
        options = {"num_warps": case["warps"], **({"num_stages": case["stages"]} if "stages" in case else {})}
        made = triton.compile(ASTSource(function, signature, fixed, aligned), target=GPUTarget("cuda", 90, 32), options=options)
        code = made.asm["ptx"]
        facts = used(made)
        wide = {f"wide_{kind}s": f"{short}.global.v4" in code for kind, short in (("load", "ld"), ("store", "st"))}
        ways = {"copies": "cp.async.cg.shared.global" in code, "tensor_cores": "mma.sync" in code or "wgmma" in code}
        print(json.dumps({"shared": made.metadata.shared, **facts, **wide, **ways}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
