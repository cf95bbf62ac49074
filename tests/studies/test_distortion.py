"""Brightness and contrast of images whose moments are known."""

import pytest
import torch
from tests import tolerances

from batchnorm.studies.distortion import Distortion, make_distortion
from batchnorm.studies.settings import CellSettings, SettingsError
from batchnorm.studies.tasks import load_task
from batchnorm.studies.training import check_cells

AMOUNT = 0.4


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return 3 + 2 * torch.randn(2000, 3, 5, 4, generator=torch.manual_seed(0))


def test_means_and_deviations_are_those_that_were_drawn(images: torch.Tensor) -> None:
    distorted = Distortion(AMOUNT, 7, images)(11, images)
    brightness = (distorted.mean((1, 2, 3)) - images.mean((1, 2, 3))) / images.std()
    contrast = distorted.std((1, 2, 3)) / images.std((1, 2, 3)) - 1
    for drawn in (brightness, contrast):
        # Uniform in [-a, a]: the deciles of 2,000 are within 3 standard errors of 0.011 * 2a.
        deciles = drawn.quantile(torch.linspace(0, 1, 11))
        assert torch.allclose(deciles, torch.linspace(-AMOUNT, AMOUNT, 11), atol=0.027)
        assert drawn.abs().max() <= AMOUNT * (1 + tolerances.SINGLE)
    assert abs(torch.corrcoef(torch.stack([brightness, contrast]))[0, 1]) < 0.07  # 3 / sqrt(2000)


def test_an_image_changes_by_nothing_but_brightness_and_contrast(images: torch.Tensor) -> None:
    distorted = Distortion(AMOUNT, 0, images)(0, images)

    def standardised(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)

    before, after = standardised(images), standardised(distorted)
    assert torch.allclose(after, before, atol=tolerances.LIKE_TORCH)


def test_it_depends_on_seed_and_step_alone(images: torch.Tensor) -> None:
    first = Distortion(AMOUNT, 0, images)(5, images[:10])
    assert torch.equal(Distortion(AMOUNT, 0, images)(5, images[:10]), first)
    for seed, step in ((1, 5), (0, 6)):
        assert not torch.equal(Distortion(AMOUNT, seed, images)(step, images[:10]), first)


def test_what_is_asked_for() -> None:
    cell = CellSettings(norm="none", lr=0.1, seed=0, batch_size=10)
    assert make_distortion(cell, load_task("digits")) is None
    asked = cell.model_copy(update={"task": "gaussian", "model": "linear", "distortion": 0.1})
    with pytest.raises(SettingsError, match="inputs of shape 10, not images"):
        check_cells([asked])
