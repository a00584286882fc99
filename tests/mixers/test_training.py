"""Models with mixers are trained by transformers' Trainer as they are: nothing is told it of mixers."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import effconvert
from effconvert.steps import load
from tests.mixers.mixing import ROWS, pair, run, small, tokens

KINDS = {name: "llama" if "llama" in row.kinds else "bert" for name, row in ROWS.items()}


@pytest.mark.few(4)
@pytest.mark.parametrize("name", ROWS)
def test_trainer_teaches_a_text_and_saves_what_it_has_taught(name, tmp_path):
    kind, length = KINDS[name], 20
    _, model = pair(kind, (name, small(name, kind)))
    before = {parameter: value.detach().clone() for parameter, value in model.named_parameters()}
    texts = [{"input_ids": row, "labels": row, "attention_mask": torch.ones(length, dtype=torch.long)} for row in tokens(4, length)]
    how = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "seed": 0}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "run"), **how, **quiet), train_dataset=texts)
    losses = [trainer.evaluate(texts)["eval_loss"]]
    trainer.train()
    losses.append(trainer.evaluate(texts)["eval_loss"])
    assert losses[1] < 0.7 * losses[0]
    trainer.save_model(str(tmp_path / "saved"))

    again = effconvert.load(tmp_path / "saved", dtype="float32", device="cpu").model
    assert torch.equal(run(again, tokens()), run(model.eval(), tokens()))
    moved = {parameter for parameter, value in model.named_parameters() if not torch.equal(value, before[parameter])}
    frozen = load(name)(**small(name, kind)).frozen
    for parameter in (parameter for parameter in before if ".mixer." in parameter):
        assert (parameter in moved) == (parameter.rpartition(".")[2] not in frozen), parameter
