"""Every task: what its batches are, that its splits are fixed and disjoint, and that it learns."""

from __future__ import annotations

import gzip
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn

from lightning_autolr import tasks
from lightning_autolr.tasks.data import InMemoryData, TensorData, hold_out

# Lightning flattens loaders in a way that new versions of torch warn of.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

FASHION = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
TEXT = "the quick brown fox jumps over the lazy dog. " * 400


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def fit(task: tasks.ClassificationTask, data: InMemoryData, **options: object) -> dict[str, float]:
    """Train without files or bars, then test."""
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(task, datamodule=data)
    return dict(trainer.test(task, datamodule=data, verbose=False)[0])


def ready(data: InMemoryData) -> InMemoryData:
    data.setup()
    return data


# --- data


def test_a_batch_is_the_stacked_samples() -> None:
    data = TensorData(torch.rand(7, 3), torch.arange(7), transform=lambda x, y: (2 * x, y))
    rows = [5, 0, 2]
    for column, batch in enumerate(data.__getitems__(rows)):
        assert torch.equal(batch, torch.stack([data[r][column] for r in rows]))


def test_tensors_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="all of one length"):
        TensorData(torch.zeros(3), torch.zeros(4))


@pytest.mark.parametrize(("num_train", "num_val"), [(0, 1), (None, 0), (None, 10), (8, 3), (-1, 3)])
def test_impossible_splits_are_refused(num_train: int | None, num_val: int) -> None:
    with pytest.raises(ValueError, match="sum of at most 10"):
        hold_out(10, num_train, num_val, seed=0)


def test_a_smaller_training_set_is_part_of_the_larger_one_and_apart_from_validation() -> None:
    all_, val = hold_out(100, None, 20, seed=3)
    few, same_val = hold_out(100, 30, 20, seed=3)
    assert torch.equal(few, all_[:30])
    assert torch.equal(val, same_val)
    assert sorted([*all_.tolist(), *val.tolist()]) == list(range(100))
    assert not torch.equal(hold_out(100, None, 20, seed=4)[1], val)


MAKE: dict[str, Callable[[str], InMemoryData]] = {
    "digits": lambda text: tasks.DigitsData(batch_size=16),
    "cifar": lambda text: tasks.CIFAR10Data(batch_size=16, fake_data=True),
    "char_lm": lambda text: tasks.CharLMData(batch_size=16, path=text, context=32),
    "fashion_mnist": lambda text: tasks.FashionMNISTData(batch_size=16, num_train=100, num_val=50),
}
CASES = [pytest.param(name, marks=needs_fashion if name == "fashion_mnist" else ()) for name in MAKE]
SHAPES = {"digits": (1, 8, 8), "cifar": (3, 32, 32), "char_lm": (32,), "fashion_mnist": (1, 28, 28)}


@pytest.mark.parametrize("name", CASES)
def test_batches(name: str, text: str) -> None:
    data = ready(MAKE[name](text))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        inputs, classes = next(iter(loader))
        assert inputs.shape[1:] == SHAPES[name]
        assert classes.dtype == torch.long
        assert len(inputs) == len(classes) == (16 if loader.drop_last else len(classes))
    assert len(data.train_dataloader()) == len(data.splits.train) // 16
    assert not data.train_dataloader().pin_memory


@pytest.mark.parametrize("name", CASES)
def test_splits_depend_on_their_own_seed_alone(name: str, text: str) -> None:
    def stored(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        splits = ready(MAKE[name](text)).splits
        return [t for part in (splits.train, splits.val, splits.test) for t in part.tensors]

    assert all(torch.equal(a, b) for a, b in zip(stored(1), stored(2), strict=True))


@pytest.mark.parametrize("name", ["digits", "char_lm"])
def test_a_training_set_smaller_than_a_batch_is_refused(name: str, text: str) -> None:
    data = MAKE[name](text)
    data.batch_size = 10_000
    with pytest.raises(ValueError, match="batch_size <= "):
        data.setup()


def test_loaders_need_setup() -> None:
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        tasks.DigitsData().train_dataloader()


def test_batch_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="batch_size and eval_batch_size >= 1"):
        tasks.DigitsData(batch_size=0)


# --- digits


def test_digits_are_scaled_and_all_there() -> None:
    splits = ready(tasks.DigitsData(num_val=300, num_test=400)).splits
    images = torch.cat([part.tensors[0] for part in (splits.train, splits.val, splits.test)])
    assert [len(splits.train), len(splits.val), len(splits.test)] == [1097, 300, 400]
    assert len({tuple(image.flatten().tolist()) for image in images}) > 1780  # all different but a few twins
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_label_noise_is_its_exact_share_of_the_training_labels(share: float) -> None:
    clean, noisy = ready(tasks.DigitsData()).splits, ready(tasks.DigitsData(label_noise=share)).splits
    wrong = (clean.train.tensors[1] != noisy.train.tensors[1]).sum().item()
    assert wrong == round(share * len(clean.train))
    assert torch.equal(clean.val.tensors[1], noisy.val.tensors[1])
    assert torch.equal(clean.test.tensors[1], noisy.test.tensors[1])
    assert noisy.train.tensors[1].min() >= 0
    assert noisy.train.tensors[1].max() <= 9


@pytest.mark.parametrize(
    "options", [{"num_val": 0}, {"num_test": 1797}, {"label_noise": 1.1}, {"label_noise": math.nan}]
)
def test_digits_refuse(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        tasks.DigitsData(**options)


# --- fashion-mnist


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes(), compresslevel=1))


@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_from_root(tmp_path: Path, below: str) -> None:
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    images = np.zeros((60_000, 28, 28), np.uint8)
    images[:, 3, 5] = np.arange(60_000) % 251
    labels = (np.arange(60_000) % 10).astype(np.uint8)
    for part, num in (("train", 60_000), ("t10k", 40)):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images[:num])
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels[:num])
    splits = ready(tasks.FashionMNISTData(root=str(tmp_path), num_train=200, num_val=10)).splits
    assert [len(splits.train), len(splits.val), len(splits.test)] == [200, 10, 40]
    inputs, classes = splits.test.__getitems__(range(40))
    assert torch.allclose(inputs[:, 0, 3, 5] * 0.3530 + 0.2860, torch.arange(40) / 255, atol=1e-6)
    assert torch.equal(classes, torch.arange(40) % 10)


def test_fashion_mnist_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_autolr.tasks.fashion_mnist._DEBIAN", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="download: true"):
        tasks.FashionMNISTData(root=str(tmp_path)).setup()


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="00 00 08"):
        tasks.FashionMNISTData(root=str(tmp_path)).setup()


@needs_fashion
def test_debian_fashion_mnist_has_the_published_counts() -> None:
    splits = ready(tasks.FashionMNISTData()).splits
    labels = torch.cat([splits.train.tensors[1], splits.val.tensors[1]])
    assert torch.bincount(labels).tolist() == [6000] * 10
    assert torch.bincount(splits.test.tensors[1]).tolist() == [1000] * 10
    inputs, _ = splits.train.__getitems__(range(5000))
    assert inputs.mean().item() == pytest.approx(0, abs=0.02)
    assert inputs.std().item() == pytest.approx(1, abs=0.02)


# --- cifar


def test_cifar_says_what_to_do_without_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="fake_data: true"):
        tasks.CIFAR10Data(root=str(tmp_path)).setup()


def test_augmented_images_are_shifted_and_mirrored_copies() -> None:
    plain = ready(tasks.CIFAR10Data(fake_data=True, augment=False)).splits.train
    augmented = ready(tasks.CIFAR10Data(fake_data=True)).splits.train
    torch.manual_seed(0)
    rows = range(64)
    originals, images = plain.__getitems__(rows)[0], augmented.__getitems__(rows)[0]
    found = set()
    for original, image in zip(originals, images, strict=True):
        padded = nn.functional.pad(original, (4,) * 4)
        shifts = {
            (y - 4, x - 4, mirrored)
            for y in range(9)
            for x in range(9)
            for mirrored, candidate in ((False, image), (True, image.flip(-1)))
            if torch.equal(padded[:, y : y + 32, x : x + 32], candidate)
        }
        assert len(shifts) == 1
        found |= shifts
    assert {s[0] for s in found} >= {-4, 0, 4}
    assert {s[2] for s in found} == {False, True}


# --- char_lm


def test_pieces_follow_each_other_and_targets_are_the_next_bytes(text: str) -> None:
    splits = ready(tasks.CharLMData(path=text, context=32)).splits
    joined = b""
    for part in (splits.train, splits.val, splits.test):
        inputs, targets = part.__getitems__(range(len(part)))
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        whole = bytes(inputs.flatten().tolist())
        assert whole in TEXT.encode()
        joined += whole
    assert len(joined) > 0.98 * len(TEXT)
    first = splits.train[0]
    assert bytes(first[0].tolist()).decode() == TEXT[:32]
    assert bytes(first[1].tolist()).decode() == TEXT[1:33]


@pytest.mark.parametrize(
    "options", [{"val_fraction": 0.0}, {"val_fraction": 0.6, "test_fraction": 0.4}, {"context": 0}, {"num_bytes": 0}]
)
def test_char_lm_refuses(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        tasks.CharLMData(**options)


def test_a_text_too_short_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="longer text"):
        tasks.CharLMData(path=text, context=32, num_bytes=400).setup()


def test_without_a_text_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match="set `path`"):
        tasks.CharLMData().setup()


@pytest.mark.skipif(shutil.which("bible") is None, reason="needs Debian's bible-kjv")
def test_the_bible_is_the_default_text() -> None:
    first = ready(tasks.CharLMData(num_bytes=100_000)).splits.train[0][0]
    assert "In the beginning God created the heaven and the earth.\nAnd the earth" in bytes(first.tolist()).decode()


# --- networks

IMAGES = {
    "plain": lambda: tasks.ConvNet(widths=(4, 8)),
    "batch_norm": lambda: tasks.ConvNet(widths=(4, 8), batch_norm=True),
    "vision_transformer": lambda: tasks.VisionTransformer(image_size=28, width=16),
    "mixer": lambda: tasks.MLPMixer(image_size=28, width=16),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_networks_treat_samples_apart_and_use_all_parameters(name: str) -> None:
    torch.manual_seed(0)
    network, images = IMAGES[name](), torch.randn(3, 1, 28, 28)
    network(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    network.eval()
    assert torch.allclose(network(images)[1:2], network(images[1:2]), atol=1e-5)
    assert bool([m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]) == (name == "batch_norm")


def test_patches_have_to_fit() -> None:
    with pytest.raises(ValueError, match="multiple of patch_size"):
        tasks.VisionTransformer(image_size=30)


def test_the_byte_transformer_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    network = tasks.ByteTransformer(context=12, width=16, num_heads=2).eval()
    text = torch.randint(256, (1, 12))
    changed = text.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 256
    before, after = network(text), network(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-5)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-2)
    assert "mask" not in network.state_dict()


# --- task


def test_the_losses_and_accuracies_are_means_over_samples() -> None:
    seed_everything(0)
    data = tasks.DigitsData(eval_batch_size=77)  # 400 test images: six batches, the last one smaller
    task = tasks.ClassificationTask(tasks.ConvNet())
    result = fit(task, data, max_steps=5)
    inputs, classes = data.splits.test.__getitems__(range(400))
    with torch.no_grad():
        logits = task.eval()(inputs)
    assert result["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, classes).item(), rel=1e-5)
    assert result["test_acc"] == pytest.approx((logits.argmax(-1) == classes).float().mean().item(), rel=1e-6)


def test_the_optimizer_has_the_librarys_own_learning_rate() -> None:
    task = tasks.ClassificationTask(nn.Linear(2, 10), optimizer=torch.optim.AdamW)
    optimizer = task.configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == torch.optim.AdamW([torch.zeros(1)]).param_groups[0]["lr"]


def test_digits_are_learned() -> None:
    seed_everything(0)
    task = tasks.ClassificationTask(
        tasks.ConvNet(widths=(8, 16)), optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)
    )
    assert fit(task, tasks.DigitsData(), max_steps=150)["test_acc"] > 0.9


def test_a_text_is_learned(text: str) -> None:
    seed_everything(0)
    task = tasks.ClassificationTask(
        tasks.ByteTransformer(context=32, width=32), 256, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3)
    )
    assert fit(task, tasks.CharLMData(path=text, context=32, batch_size=16), max_steps=100)["test_loss"] < 1


def test_predictions_are_the_logits_of_the_test_set() -> None:
    task, data = tasks.ClassificationTask(tasks.ConvNet()), tasks.DigitsData(eval_batch_size=100)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert [p.shape for p in trainer.predict(task, datamodule=data)] == [(100, 10)] * 4
