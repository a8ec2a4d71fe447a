"""Samples that are measured have the training images' classes; those that are shown take turns."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from multistage_diffusion.config import DataConfig
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation import PixelFeatures, frechet_distance
from multistage_diffusion.samplers.class_labels import (
    class_counts,
    class_name,
    class_names,
    class_number,
    frequent_labels,
    labels_in_turn,
    names_of,
    warn_of_empty,
)

CASES = Path(__file__).parents[1] / "data" / "cases"


@pytest.fixture(name="config")
def fixture_config(tiny_config):
    """Return a function that gives a configuration with class counts."""

    def make(*counts: int):
        config = tiny_config(network__num_classes=len(counts))
        return dataclasses.replace(config, data=dataclasses.replace(config.data, class_counts=counts))

    return make


def test_labels_have_the_frequencies(config):
    labels = frequent_labels(config(60, 0, 30, 10), 20_000, seed=3)
    shares = torch.bincount(labels, minlength=4) / len(labels)
    assert labels.dtype == torch.int64
    assert shares.tolist() == pytest.approx([0.6, 0.0, 0.3, 0.1], abs=0.012)  # 3.5 standard errors
    assert shares[1] == 0


def test_a_label_depends_on_seed_and_number_alone(config):
    counts = config(3, 4, 5)
    long = frequent_labels(counts, 100, seed=1)
    assert torch.equal(frequent_labels(counts, 10, seed=1), long[:10])
    assert not torch.equal(frequent_labels(counts, 100, seed=2), long)


def test_classes_without_images_are_never_drawn(config):
    counts = config(0, 5, 0, 1, 0)
    assert set(frequent_labels(counts, 500, seed=0).tolist()) == {1, 3}
    assert labels_in_turn(counts, 5).tolist() == [1, 3, 1, 3, 1]


def test_unconditional_runs_have_no_labels(tiny_config, tiny_data):
    assert frequent_labels(tiny_config(), 5, seed=0) is None
    assert labels_in_turn(tiny_config(), 5) is None
    assert class_counts(tiny_data(classes=3), 0) == class_counts(tiny_data(), 3) == ()


def test_runs_that_do_not_know_their_classes_get_equal_shares_and_say_so(tiny_config):
    config = tiny_config(network__num_classes=4)
    with pytest.warns(UserWarning, match="equal shares"):
        labels = frequent_labels(config, 8000, seed=0)
    assert (torch.bincount(labels) / 8000).tolist() == pytest.approx([0.25] * 4, abs=0.02)
    assert labels_in_turn(config, 5).tolist() == [0, 1, 2, 3, 0]


def test_images_are_counted_by_class(tiny_data):
    assert class_counts(tiny_data(31, classes=3), 3) == (11, 10, 10)
    assert class_counts(tiny_data(30, classes=3), 5) == (10, 10, 10, 0, 0)


def test_empty_classes_are_named():
    with pytest.warns(UserWarning, match=r"2 of 5 classes have no training images \(3, 4\)"):
        warn_of_empty((10, 10, 10, 0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_empty((1, 2))
        warn_of_empty(())
    with pytest.warns(UserWarning, match=r"0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\."):
        warn_of_empty((0,) * 30 + (1,))


@pytest.mark.parametrize("counts", [(-1, 2), (0, 0)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(UserError, match="class_counts"):
        DataConfig(class_counts=counts)


def test_counts_of_other_classes_are_refused(config):
    changed = config(1, 2, 3)
    other = dataclasses.replace(changed, network=dataclasses.replace(changed.network, num_classes=4))
    with pytest.raises(UserError, match=r"data\.class_counts holds 3 numbers, but network\.num_classes=4"):
        frequent_labels(other, 3, seed=0)


def test_unequal_classes_are_measured_rightly(tiny_config):
    """A perfect class-conditional model: for each label it gives a real image of that class."""
    data = open_data(CASES / "imbal.npz")
    pixels, real = PixelFeatures(), data.tensor()
    classes = data.num_classes
    config = tiny_config(network__num_classes=classes, data__class_counts=class_counts(data, classes))

    def distance(labels: torch.Tensor) -> float:
        draw = torch.Generator().manual_seed(0)
        members = [torch.from_numpy(np.flatnonzero(data.labels == k)) for k in range(data.num_classes)]
        chosen = [members[k][torch.randint(len(members[k]), (), generator=draw)] for k in labels.tolist()]
        return frechet_distance(pixels(real[torch.stack(chosen)]), pixels(real))

    frequent = distance(frequent_labels(config, 2000, seed=0))
    in_turn = distance(labels_in_turn(config, 2000))
    assert frequent < in_turn / 3


def test_a_class_is_given_by_its_name_or_its_number(tiny_config):
    pets = tiny_config(network__num_classes=4, data__class_names=("cats", "dogs", "0"))
    assert [class_number(pets, given) for given in ("cats", "dogs", 1, "1", 3, "3")] == [0, 1, 1, 1, 3, 3]
    assert class_number(pets, "0") == 2  # a folder's name is what a user sees
    assert class_number(pets, 0) == 0
    assert [class_name(pets, number) for number in range(4)] == ["cats", "dogs", "0", "3"]
    assert names_of(pets, torch.tensor([1, 3, 1])) == ["dogs", "3", "dogs"]
    assert names_of(pets, None) is None


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        ((), "cats", r"label=cats: it must be in 0\.\.3"),
        (("cats", "dogs"), 4, r"label=4: it must be in 0\.\.3, or one of cats, dogs"),
        (("cats", "dogs"), "-1", r"label=-1: it must be in 0\.\.3, or one of cats, dogs"),
        (("cats", "dogs"), "cat", r"label=cat: no class of this name; did you mean 'cats'\?"),
        (("crane", "owl", "crane"), "crane", "label=crane: is the name of classes 0, 2; give the number"),
    ],
)
def test_a_class_that_is_not_there_is_refused_with_the_names(tiny_config, names, given, message):
    with pytest.raises(UserError, match=message):
        class_number(tiny_config(network__num_classes=4, data__class_names=names), given)


def test_names_that_are_the_numbers_are_none(tiny_data):
    assert class_names(tiny_data(classes=3), 3) == ()
    named = open_data(CASES / "win.zip")
    assert class_names(named, 2) == ("cats", "dogs")
    assert class_names(named, 0) == ()


def test_a_warning_of_empty_classes_names_them():
    with pytest.warns(UserWarning, match=r"2 of 3 classes have no training images \(1 dogs, 2\)"):
        warn_of_empty((5, 0, 0), ("cats", "dogs"))


def test_a_class_without_training_images_is_drawn_with_a_warning(tiny_config):
    config = tiny_config(network__num_classes=3, data__class_counts=(5, 0, 2))
    with pytest.warns(UserWarning, match="label=1: the run was trained on no image of this class"):
        assert class_number(config, 1) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [class_number(config, label) for label in (0, 2)] == [0, 2]
