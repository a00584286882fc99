"""The divergences of a student's distribution from a teacher's, by name. Without torch, so that options can list them."""

from typing import Literal, get_args

Kind = Literal["kl", "reverse-kl", "jsd"]  # KL(teacher || student), KL(student || teacher), and Jensen-Shannon: half of both to their mean
KINDS: tuple[Kind, ...] = get_args(Kind)
SparseKind = Literal[Kind, "samples"]  # of what is known of the teacher's in part; samples: KL of those, but for the teacher's entropy
SPARSE_KINDS: tuple[SparseKind, ...] = get_args(SparseKind)
