"""Heads in models of transformers, trained by its own Trainer, which knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from etflayers.errors import InvalidArgumentError
from etflayers.nn import NearestETFHead, capture_targets, replace_classifier, restore_linear

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # the Trainer needs it

pytestmark = pytest.mark.filterwarnings("ignore", r"error:::etflayers(\.|$)")

K, SAMPLES, TOKENS = 5, 40, 7
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": K,
}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Inputs by the names that a model has for them, and labels."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = {**columns, "labels": torch.arange(SAMPLES) % K}

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def sentences() -> Rows:
    """The class is the last word; what comes before is noise."""
    words = torch.randint(5, 20, (SAMPLES, TOKENS))
    words[:, -1] = 20 + torch.arange(SAMPLES) % K
    return Rows(input_ids=words, attention_mask=torch.ones_like(words))


def images() -> Rows:
    """Each class is a picture, with noise."""
    pictures = torch.randn(K, 3, 8, 8)[torch.arange(SAMPLES) % K]
    return Rows(pixel_values=pictures + 0.3 * torch.randn_like(pictures))


def bert() -> nn.Module:
    model: nn.Module = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=30, **SMALL)
    )
    return model


def vit() -> nn.Module:
    model: nn.Module = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, **SMALL)
    )
    return model


def gpt2() -> nn.Module:
    size = {"vocab_size": 30, "n_embd": 32, "n_layer": 1, "n_head": 2, "num_labels": K}
    config = transformers.GPT2Config(**size, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    model: nn.Module = transformers.GPT2ForSequenceClassification(config)
    return model


def at_the_pooled_token(input_ids: Tensor, labels: Tensor, attention_mask: Tensor, **others: Any) -> Tensor:
    """GPT2 applies its classifier to every token and takes the logits of the last: docs/howto/heads.md."""
    last = (attention_mask * torch.arange(input_ids.shape[1])).argmax(-1)
    return torch.full_like(input_ids, -100).scatter(1, last[:, None], labels[:, None])


def trainer(model: nn.Module, rows: Rows, folder: Path, epochs: int, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=10,
        learning_rate=5e-3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", **options},
    )
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def head_of(model: nn.Module) -> NearestETFHead:
    (head,) = (module for module in model.modules() if isinstance(module, NearestETFHead))
    return head


@pytest.mark.parametrize(
    ("make", "rows", "targets", "head"),
    [
        pytest.param(bert, sentences, "labels", NearestETFHead, id="bert"),
        pytest.param(vit, images, "labels", NearestETFHead, id="vit"),
        # Its own classifier has no bias, so from_pretrained would leave out that of a head with a center.
        pytest.param(gpt2, sentences, at_the_pooled_token, partial(NearestETFHead, center=False), id="gpt2"),
    ],
)
def test_the_trainer_trains_evaluates_and_saves(
    make: Callable[[], nn.Module],
    rows: Callable[[], Rows],
    targets: str | Callable[..., Tensor],
    head: Callable[[int, int], nn.Module],
    tmp_path: Path,
) -> None:
    model, epochs = replace_classifier(make(), head), 15
    capture = capture_targets(model, targets)
    train = trainer(model, data := rows(), tmp_path, epochs)
    train.train()
    assert head_of(model).averages.counts.tolist() == [epochs * SAMPLES // K] * K
    answer = train.predict(data)
    assert (answer.predictions.argmax(-1) == answer.label_ids).mean() == 1
    # What is saved after restore_linear is a model of transformers, for those who do not have this library.
    capture.remove()
    restore_linear(model).save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert not any(type(module).__module__.startswith("etflayers") for module in loaded.modules())
    again = trainer(loaded, data, tmp_path, epochs).predict(data).predictions
    torch.testing.assert_close(torch.tensor(again), torch.tensor(answer.predictions), rtol=1e-4, atol=1e-4)


def test_training_resumes_from_a_checkpoint_of_the_trainer(tmp_path: Path) -> None:
    def run(seed: int, **options: Any) -> nn.Module:
        torch.manual_seed(seed)
        model = replace_classifier(bert(), NearestETFHead)
        capture_targets(model)
        trainer(model, data, tmp_path, 2, save_strategy="epoch").train(**options)
        return model

    data = sentences()
    whole = run(0)
    # From other weights: those of the checkpoint have to replace them.
    resumed = run(1, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict())
    assert head_of(resumed).averages.counts.tolist() == [2 * SAMPLES // K] * K


def test_one_label_a_sentence_is_refused_where_the_head_sees_tokens(tmp_path: Path) -> None:
    model = replace_classifier(gpt2(), NearestETFHead)
    capture_targets(model)
    with pytest.raises(InvalidArgumentError, match="Where a model pools after"):
        trainer(model, sentences(), tmp_path, 1).train()
