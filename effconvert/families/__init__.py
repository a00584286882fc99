"""All families, by their `model_type`: rows of data, and the only place with names of parameters.

Adding a family is adding a row to `decoders.py`, `llamas.py`, `sparse.py`, `own_attention.py`, `encoders.py` or `encoder_decoders.py`; a test builds a tiny
model of every row and checks that each parameter has exactly one place.
"""

from collections.abc import Mapping
from types import MappingProxyType

from effconvert.families.decoders import DECODERS
from effconvert.families.encoder_decoders import ENCODER_DECODERS
from effconvert.families.encoders import ALBERT, ENCODERS
from effconvert.families.family import EXPERTS_KEYS, Family
from effconvert.families.llamas import LLAMAS
from effconvert.families.own_attention import OWN_ATTENTION
from effconvert.families.sparse import SPARSE

__all__ = ["CONVERTIBLE", "ENCODER_DECODERS", "EXPERTS_KEYS", "FAMILIES", "KNOWN", "Family"]

FAMILIES: Mapping[str, Family] = MappingProxyType({**DECODERS, **LLAMAS, **SPARSE, **OWN_ATTENTION, **ENCODERS})  # with a single stack of layers
CONVERTIBLE: Mapping[str, Family] = MappingProxyType({**FAMILIES, **ENCODER_DECODERS})
KNOWN: Mapping[str, Family] = MappingProxyType({**CONVERTIBLE, "albert": ALBERT})  # with those that conversions write and read, and no step changes
