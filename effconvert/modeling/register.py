"""Make transformers' AutoConfig know the families with techniques in them: what `import effconvert` does as soon as somebody imports it."""

from functools import partial
from typing import Any

from effconvert.checkpoint.families import FAMILIES
from effconvert.checkpoint.replaced import KIND
from effconvert.modeling.stand_ins import stand_in


def configs() -> None:
    """Register the configs; called when transformers' AutoConfig has been imported, maybe while other modules of it still are."""
    from transformers import AutoConfig

    for kind in FAMILIES:
        AutoConfig.register(KIND + kind, stand_in(partial(_config_class, kind), model_type=KIND + kind), exist_ok=True)


def _config_class(kind: str) -> Any:
    from effconvert.modeling.model import config_class  # not before: it needs transformers whole

    return config_class(kind)
