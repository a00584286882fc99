"""Register converted families with transformers' AutoConfig. `import effconvert` does it as soon as AutoConfig is imported."""

from functools import partial
from typing import Any

from effconvert.checkpoint.replaced import KIND
from effconvert.families import CONVERTIBLE
from effconvert.modeling.stand_ins import stand_in


def configs() -> None:
    """Register the configs. It is called when AutoConfig has been imported; other modules of transformers may not be yet."""
    from transformers import AutoConfig

    for kind in CONVERTIBLE:
        AutoConfig.register(KIND + kind, stand_in(partial(_config_class, kind), model_type=KIND + kind), exist_ok=True)


def _config_class(kind: str) -> Any:
    from effconvert.modeling.model import config_class  # imported late: it needs all of transformers

    return config_class(kind)
