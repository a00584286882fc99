"""What a kernel does not write is NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    with torch.device("meta"):
        torch.zeros(())  # PyTorch keeps a list of its constructors from the first time on: it should not have those below
    monkeypatch.setattr(torch, "empty", lambda *shape, real=torch.empty, **more: real(*shape, **more).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda tensor, real=torch.empty_like, **more: real(tensor, **more).fill_(torch.nan))
