"""All families, by their `model_type`: rows of data, and the only place with names of parameters.

Adding a family is adding a row to `decoders.py`, `llamas.py`, `sparse.py`, `own_attention.py` or `encoders.py`; a test builds a tiny model of every row
and checks that each parameter has exactly one place.
"""

from collections.abc import Mapping
from types import MappingProxyType

from effconvert.families.decoders import DECODERS
from effconvert.families.encoders import ENCODERS
from effconvert.families.family import EXPERTS_KEYS, Family
from effconvert.families.llamas import LLAMAS
from effconvert.families.own_attention import OWN_ATTENTION
from effconvert.families.sparse import SPARSE

__all__ = ["EXPERTS_KEYS", "FAMILIES", "TWO_STACKS", "WITHOUT_ROW", "Family"]

# Why families have no row: any with an encoder and a decoder, and some by their `model_type`.
TWO_STACKS = "it has an encoder, and a decoder that attends to it"
WITHOUT_ROW: Mapping[str, str] = MappingProxyType({"albert": "it runs a layer that is stored once many times"})

FAMILIES: Mapping[str, Family] = MappingProxyType({**DECODERS, **LLAMAS, **SPARSE, **OWN_ATTENTION, **ENCODERS})
