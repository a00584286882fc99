"""Compile kernels for a Hopper GPU on a machine without one, in a process of its own, as this one interprets them."""

import json
import os
import subprocess
import sys

SHARED = 232_448  # bytes of shared memory that a block of threads may have on sm_90


def compiled(kernel, cases):
    """Compile `module:name` for each case, and return what each takes: shared memory, registers, stack, and whether it moves 16 bytes at a time."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, __file__, kernel, json.dumps(cases)], capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(kernel, cases):
    import re
    from importlib import import_module
    from pathlib import Path
    from tempfile import TemporaryDirectory

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = kernel.partition(":")
    function, types = getattr(import_module(module), name), {"fp32": tl.float32}
    for case in cases:
        fixed = {key: types.get(value, value) for key, value in case["fixed"].items()}
        aligned = {(index,): [["tt.divisibility", 16]] for index in range(case["aligned"])}
        source = ASTSource(function, {**case["signature"], **dict.fromkeys(fixed, "constexpr")}, fixed, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": case["warps"]})
        with TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(made.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
        code = made.asm["ptx"]
        facts = {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1])}
        wide = {f"wide_{kind}s": f"{short}.global.v4" in code for kind, short in (("load", "ld"), ("store", "st"))}
        print(json.dumps({"shared": made.metadata.shared, **facts, **wide}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
