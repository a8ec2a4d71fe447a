from __future__ import annotations

import numpy as np
import pytest
import torch

from multistage_diffusion.reporting.samples import Samples


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_samples_become_images_of_pillow(channels: int, mode: str) -> None:
    images = torch.randint(0, 256, (3, channels, 4, 5), dtype=torch.uint8)
    found = Samples.of(images, torch.tensor([0, 1, 0]), ["cats", "dogs", "cats"])
    pictures = found.pil()
    assert [(p.mode, p.size) for p in pictures] == [(mode, (5, 4))] * 3
    for picture, image in zip(pictures, images, strict=True):
        assert np.array_equal(np.asarray(picture).reshape(4, 5, channels), image.permute(1, 2, 0).numpy())
    assert (found.labels.tolist(), found.class_names) == ([0, 1, 0], ["cats", "dogs", "cats"])


def test_samples_are_a_tensor_and_what_is_computed_from_them_is_one() -> None:
    images = torch.randint(0, 256, (3, 1, 4, 5), dtype=torch.uint8)
    found = Samples.of(images)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, images)
    assert (found.shape, found.dtype, found.labels, found.class_names) == (images.shape, torch.uint8, None, None)
    for made in (found[1:], found.float(), found + 1, torch.cat([found, images]), found.to("cpu", torch.int32)):
        assert type(made) is torch.Tensor
    assert found.data_ptr() == images.data_ptr()
    assert np.array_equal(found.numpy(), images.numpy())
