"""effconvert as one of several processes on CPUs: `python several.py KIND DIE ARGUMENTS...`.

KIND is ddp, or fsdp or zero1, zero2 and zero3 for FSDP2 and DeepSpeed's ZeRO, which accelerate itself leaves out on CPUs.
DIE is a step at which the process ends without a word, or 0.
"""

import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from effconvert.cli import main
from effconvert.heal import _distilling

kind, die, *arguments = sys.argv[1:]
started = PartialState.__init__


def as_on_gpus(self, *given, **more):
    started(self, *given, **more)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.DEEPSPEED if kind.startswith("zero") else DistributedType.MULTI_GPU


def ends(self, args, state, control, **more):
    if state.global_step == int(die):
        os._exit(9)


if kind != "ddp":
    PartialState.__init__ = as_on_gpus
if int(die):
    _distilling.Reporter.on_step_begin = ends
main(arguments)
