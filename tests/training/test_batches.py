from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from multistage_diffusion import rng
from multistage_diffusion.data import ImageData, to_float
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.latent.latents import LatentData
from multistage_diffusion.schedules import LogNormal
from multistage_diffusion.shares import prior_masses
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.augment import augment
from multistage_diffusion.training.batches import BatchSource, held_out_batch
from multistage_diffusion.training.losses import stage_losses
from multistage_diffusion.training.strategies import divided

CPU = torch.device("cpu")
STAGES, PRIOR = Stages((0.2, 0.6)), LogNormal()


def numbered(count: int) -> ImageData:
    """Images whose corner pixel is their number; the last column differs, so that a flip shows."""
    pixels = np.zeros((count, 1, 4, 4), np.uint8)
    pixels[:, 0, :, 0] = np.arange(count)[:, None]
    pixels[:, 0, :, 3] = 255
    return ImageData(pixels, np.arange(count) % 3, "numbered")


def numbers(batch) -> list[int]:
    """The images of a batch, by the corner that is not 255 (white)."""
    corners = ((batch.y[:, 0, 0, [0, 3]] + 1) * 127.5).round().long()
    return corners.min(1).values.tolist()


def rows_of(batch, stage: int) -> slice:
    start = sum(batch.counts[:stage])
    return slice(start, start + batch.counts[stage])


def same(a, b, rows_a=slice(None), rows_b=slice(None)) -> bool:
    return all(
        torch.equal(getattr(a, name)[rows_a], getattr(b, name)[rows_b]) for name in ("y", "noise", "sigma")
    ) and torch.equal(a.cond.labels[rows_a], b.cond.labels[rows_b])


@pytest.fixture
def source(tiny_config):
    return BatchSource(tiny_config(network__num_classes=3, training__label_dropout=0.5), numbered(17), CPU)


# -- draws ------------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_the_step_alone(source, tiny_config):
    first = source.draw(3, (4, 5, 3))
    source.draw(8, (4, 5, 3))
    assert same(first, source.draw(3, (4, 5, 3)))
    other = source.draw(4, (4, 5, 3))
    assert not torch.isin(other.sigma, first.sigma).any()
    assert not torch.isin(other.noise, first.noise).any()
    reseeded = BatchSource(tiny_config(network__num_classes=3, training__seed=1), numbered(17), CPU)
    assert not torch.isin(reseeded.draw(3, (4, 5, 3)).noise, first.noise).any()


def test_a_stage_s_rows_do_not_depend_on_the_other_stages_counts(source):
    a, b = source.draw(5, (4, 5, 3)), source.draw(5, (1, 5, 9))
    assert same(a, b, rows_of(a, 1), rows_of(b, 1))
    assert not torch.isin(a.noise[rows_of(a, 0)], a.noise[rows_of(a, 1)]).any()  # stages share no noise


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_of_a_step_add_up_to_the_whole(source, parts):
    counts = (4, 5, 2)
    whole = source.draw(6, counts)
    pieces = [source.draw(6, counts, part) for part in divided([range(count) for count in counts], parts)]
    assert tuple(map(sum, zip(*(p.counts for p in pieces), strict=True))) == counts
    for stage in range(3):
        picked = [(p, rows_of(p, stage)) for p in pieces]
        for name in ("y", "noise", "sigma"):
            joined = torch.cat([getattr(p, name)[rows] for p, rows in picked])
            assert torch.equal(joined, getattr(whole, name)[rows_of(whole, stage)])
        labels = torch.cat([p.cond.labels[rows] for p, rows in picked])
        assert torch.equal(labels, whole.cond.labels[rows_of(whole, stage)])


def test_every_stage_sees_every_image_once_an_epoch(source):
    seen = [[], [], []]
    for step in range(17 * 3):
        batch = source.draw(step, (4, 2, 1))
        for stage in range(3):
            seen[stage] += numbers(batch)[rows_of(batch, stage)]
    orders = []
    for stream in seen:
        for epoch in range(len(stream) // 17):
            order = stream[17 * epoch : 17 * (epoch + 1)]
            assert sorted(order) == list(range(17))
            orders.append(tuple(order))
    assert len(orders) == 12 + 6 + 3
    assert len(set(orders)) == len(orders)  # a fresh order for every epoch and stage


def test_images_labels_and_ranges_arrive_unchanged(tiny_config):
    data = numbered(17)
    source = BatchSource(
        tiny_config(network__num_classes=3, training__flip=False, training__label_dropout=0.0), data, CPU
    )
    batch = source.draw(0, (4, 5, 3))
    index = numbers(batch)
    assert torch.equal(batch.y, to_float(data.array()[index]))
    assert batch.cond.labels.tolist() == [i % 3 for i in index]
    assert batch.sigma.dtype == torch.float64
    assert batch.counts == (4, 5, 3)


def test_sigma_lies_in_its_stage_and_follows_the_prior_there(source):
    batch = source.draw(0, (3000, 3000, 3000))
    for stage in range(3):
        sigma = batch.sigma[rows_of(batch, stage)]
        assert set(STAGES.index(sigma).tolist()) == {stage}
        low, high = STAGES.interval(stage)
        middle = float(sigma.median())
        assert PRIOR.mass(low, middle) == pytest.approx(PRIOR.mass(low, high) / 2, rel=0.06)
    assert float(batch.noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(batch.noise.std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("flip", "dropout"), [(True, 0.25), (False, 0.25), (True, 0.0), (True, 1.0)])
def test_rates_of_flips_and_hidden_labels(tiny_config, flip, dropout):
    config = tiny_config(network__num_classes=3, training__flip=flip, training__label_dropout=dropout)
    batch = BatchSource(config, numbered(17), CPU).draw(0, (2000, 2000, 0))
    flipped = batch.y[:, 0, 0, 0] == 1.0  # white now on the left
    hidden = batch.cond.labels == -1
    assert float(flipped.float().mean()) == pytest.approx(0.5 if flip else 0, abs=0.03 if flip else 0)
    assert float(hidden.float().mean()) == pytest.approx(dropout, abs=0.03 if 0 < dropout < 1 else 0)
    if flip and 0 < dropout < 1:  # the two coins are independent
        assert float((flipped & hidden).float().mean()) == pytest.approx(0.5 * dropout, abs=0.03)
    shown = [n % 3 for n in numbers(batch)]
    assert all(label in (-1, n) for label, n in zip(batch.cond.labels.tolist(), shown, strict=True))


def test_labels_are_left_out_or_asked_for(tiny_config, tiny_data):
    assert BatchSource(tiny_config(), numbered(17), CPU).draw(0, (1, 1, 1)).cond is None
    with pytest.raises(ValueError, match=r"network\.num_classes=3 but data 'random' has no labels"):
        BatchSource(tiny_config(network__num_classes=3), tiny_data(), CPU)


# -- held-out rows ----------------------------------------------------------------------------------------------------


def test_held_out_rows_are_fixed_whole_and_in_their_stage(tiny_config):
    config = tiny_config(network__num_classes=3, training__held_out_rows=40, training__label_dropout=1.0)
    data = numbered(17)
    for stage in range(3):
        batch = held_out_batch(config, data, stage, CPU)
        assert same(batch, held_out_batch(config, data, stage, CPU))
        assert batch.counts == tuple(40 if k == stage else 0 for k in range(3))
        shown = [int(np.flatnonzero([torch.equal(y, to_float(image)) for image in data.array()])[0]) for y in batch.y]
        assert shown[:17] == shown[17:34] != sorted(shown[:17])  # every image in turn, in a drawn order
        assert sorted(shown[:17]) == list(range(17))
        assert batch.cond.labels.tolist() == [i % 3 for i in shown]
        assert set(STAGES.index(batch.sigma).tolist()) == {stage}
    assert held_out_batch(tiny_config(), data, 0, CPU).cond is None


def test_held_out_noise_levels_are_one_per_quantile(tiny_config):
    batch = held_out_batch(tiny_config(training__held_out_rows=40), numbered(17), 1, CPU)
    low, high = STAGES.interval(1)
    quantile = [PRIOR.mass(low, s) / PRIOR.mass(low, high) for s in batch.sigma.tolist()]
    assert [int(40 * q) for q in quantile] == list(range(40))


def test_more_classes_than_the_network_knows_are_refused(tiny_config):
    config = tiny_config(network__num_classes=2)
    with pytest.raises(ValueError, match=r"network\.num_classes=2 but data .* has 3 classes"):
        BatchSource(config, numbered(9), CPU)


# -- soft intervals ---------------------------------------------------------------------------------------------------


def test_hard_intervals_use_one_number_per_row_and_no_coin(tiny_config):
    for soft in ({}, {"training__soft_intervals": 0.0}):
        batch = BatchSource(tiny_config(**soft), numbered(17), CPU).draw(3, (4, 5, 3))
        for stage, count in enumerate((4, 5, 3)):
            u = rng.uniform((0, "sigma", 3), (stage << 32) + torch.arange(count), 1)[:, 0]
            assert torch.equal(batch.sigma[rows_of(batch, stage)], PRIOR.sample_within(u, *STAGES.interval(stage)))


@pytest.mark.parametrize("soft", [0.3, 1.0, (0.0, 0.6, 1.0)])
def test_soft_rows_draw_their_noise_from_the_whole_prior(tiny_config, soft):
    counts = (4000, 4000, 4000)
    batch = BatchSource(tiny_config(training__soft_intervals=soft), numbered(17), CPU).draw(0, counts)
    masses = prior_masses(STAGES, PRIOR)
    for stage in range(3):
        found = torch.bincount(STAGES.index(batch.sigma[rows_of(batch, stage)]), minlength=3) / 4000
        share = soft[stage] if isinstance(soft, tuple) else soft
        expected = [share * mass + (1 - share) * (k == stage) for k, mass in enumerate(masses)]
        assert found.tolist() == pytest.approx(expected, abs=0.03)
    hard = BatchSource(tiny_config(), numbered(17), CPU).draw(0, counts)
    assert batch.counts == hard.counts  # every row still trains its own stage's decoder
    assert torch.equal(batch.y, hard.y)
    assert torch.equal(batch.noise, hard.noise)


def test_parts_of_a_step_with_soft_intervals_add_up_and_held_out_rows_stay_in_their_stage(tiny_config):
    config = tiny_config(training__soft_intervals=0.5, training__held_out_rows=50)
    source = BatchSource(config, numbered(17), CPU)
    parts = divided([range(0), range(9), range(0)], 2)
    whole, pieces = source.draw(1, (0, 9, 0)), [source.draw(1, (0, 9, 0), part) for part in parts]
    assert torch.equal(torch.cat([p.sigma for p in pieces]), whole.sigma)
    assert set(STAGES.index(held_out_batch(config, numbered(17), 1, CPU).sigma).tolist()) == {1}


def test_an_overlap_widens_each_interval_at_its_inner_edges_and_no_further(tiny_config):
    config = tiny_config(training__overlap=0.3, training__held_out_rows=50)
    batch = BatchSource(config, numbered(17), CPU).draw(0, (2000, 2000, 2000))
    for stage in range(3):
        low, high = STAGES.interval(stage)
        wide = (low * math.exp(-0.3), high * math.exp(0.3))
        sigma = batch.sigma[rows_of(batch, stage)]
        assert wide[0] <= float(sigma.min()) <= float(sigma.max()) <= wide[1]
        for beyond, inside in ((sigma < low, (wide[0], low)), (sigma >= high, (high, wide[1]))):
            expected = PRIOR.mass(*inside) / PRIOR.mass(*wide) if inside[0] > 0 and inside[1] < math.inf else 0.0
            assert float(beyond.double().mean()) == pytest.approx(expected, abs=0.03)
            assert (expected > 0) == bool(beyond.any())
        assert set(STAGES.index(held_out_batch(config, numbered(17), stage, CPU).sigma).tolist()) == {stage}


class Announced:
    """Rows that note what is announced and what is drawn."""

    def __init__(self, data) -> None:
        self.data, self.shape, self.announced, self.drawn = data, data.shape, [], []

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, indices):
        self.drawn += indices.tolist()
        return self.data.rows(indices)

    def prefetch(self, indices) -> None:
        self.announced.append(indices.tolist())


def test_exactly_the_rows_of_the_step_are_announced(tiny_config):
    rows = Announced(numbered(17))
    source = BatchSource(tiny_config(), ImageData(rows, None, "set"), CPU)
    parts = [((7, 0, 3), (range(0, 4), range(0), range(0, 2))), ((7, 0, 3), (range(4, 7), range(0), range(2, 3)))]
    for step in (0, 1, 5):  # in the last, a stage is in its third epoch
        rows.announced.clear()
        source.prefetch(step, parts)
        rows.drawn.clear()
        for counts, of in parts:
            source.draw(step, counts, of)
        assert rows.announced == [rows.drawn]
        assert len(rows.drawn) == 10
    source.prefetch(6, [])
    assert len(rows.announced) == 1


# -- several processes ------------------------------------------------------------------------------------------------


def test_rows_of_all_processes_make_the_step_without_overlap(tiny_config):
    source = BatchSource(tiny_config(), numbered(17), CPU)
    whole, counts = source.draw(4, (7, 0, 3)), (7, 0, 3)
    shares = [(range(0, 3), range(0), range(2, 3)), (range(3, 7), range(0), range(0, 2))]
    pieces = [source.draw(4, counts, own) for own in shares]
    assert [p.counts for p in pieces] == [(3, 0, 1), (4, 0, 2)]
    order = [0, 1, 2, 9, 3, 4, 5, 6, 7, 8]
    for name in ("y", "noise", "sigma"):
        assert torch.equal(torch.cat([getattr(p, name) for p in pieces]), getattr(whole, name)[order])


def test_part_of_a_batch_of_one_stage(tiny_config):
    config = tiny_config(network__num_classes=3)
    whole = held_out_batch(config, numbered(17), 2, CPU)
    part = whole.part(range(1, 3))
    assert part.counts == (0, 0, 2)
    assert torch.equal(part.cond.labels, whole.cond.labels[1:3])
    for name in ("y", "noise", "sigma"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[1:3])


@pytest.mark.parametrize(("counts", "most", "parts"), [((7, 0, 5), 3, 3), ((1, 1, 2), 5, 2), ((4, 4, 4), 1, 1)])
def test_shards_divide_every_stage_s_rows(source, counts, most, parts):
    whole = source.draw(4, counts)
    found = whole.shards(most)
    assert len(found) == parts
    assert all(sum(shard.counts) == len(shard.y) > 0 for shard in found)
    for stage, count in enumerate(counts):
        sizes = [shard.counts[stage] for shard in found]
        assert sum(sizes) == count
        assert max(sizes) - min(sizes) <= 1
    for stage in range(3):  # dealt in turn: every stage begins with another shard
        dealt = found[-stage % parts :] + found[: -stage % parts]
        for name in ("y", "noise", "sigma"):
            rows = torch.cat([getattr(shard, name)[rows_of(shard, stage)] for shard in dealt])
            assert torch.equal(rows, getattr(whole, name)[rows_of(whole, stage)])
        labels = torch.cat([shard.cond.labels[rows_of(shard, stage)] for shard in dealt])
        assert torch.equal(labels, whole.cond.labels[rows_of(whole, stage)])


def test_what_does_not_divide_evenly_does_not_pile_up_on_one_shard(source):
    assert [len(shard.y) for shard in source.draw(0, (7, 5, 4)).shards(2)] == [8, 8]


# -- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("classes", [0, 3])
def test_augmented_rows_come_with_what_was_done_to_them(tiny_config, flip, classes):
    changes = {"network__num_classes": classes, "training__flip": flip}
    plain = BatchSource(tiny_config(**{**changes, "training__flip": False}), numbered(17), CPU).draw(2, (9, 0, 40))
    config = tiny_config(**changes, training__augment=0.3, network__augment_dim=9)
    batch = BatchSource(config, numbered(17), CPU).draw(2, (9, 0, 40))
    rows = torch.cat([torch.arange(9), (2 << 32) + torch.arange(40)])
    y, done = augment(plain.y, 0.3, (0, "augment", 2), rows, flip=flip)
    assert torch.equal(batch.y, y)
    assert torch.equal(batch.cond.augment, done)
    assert bool(done[:, 0].any()) == flip
    assert torch.equal(batch.noise, plain.noise)
    assert torch.equal(batch.sigma, plain.sigma)
    if classes:
        assert torch.equal(batch.cond.labels, plain.cond.labels)
    else:
        assert batch.cond.labels is None


def test_parts_of_an_augmented_step_add_up_to_the_whole(tiny_config):
    source = BatchSource(tiny_config(training__augment=0.5, network__augment_dim=9), numbered(17), CPU)
    parts = divided([range(0), range(11), range(0)], 3)
    whole, pieces = source.draw(6, (0, 11, 0)), [source.draw(6, (0, 11, 0), part) for part in parts]
    assert torch.equal(torch.cat([p.y for p in pieces]), whole.y)
    assert torch.equal(torch.cat([p.cond.augment for p in pieces]), whole.cond.augment)


def test_held_out_rows_are_not_augmented(tiny_config):
    changes = {"training__augment": 1.0, "network__augment_dim": 9, "network__num_classes": 3}
    config, data = tiny_config(**changes), numbered(17)
    batch = held_out_batch(config, data, 0, CPU)
    assert batch.cond.augment is None
    assert same(batch, held_out_batch(tiny_config(network__num_classes=3), data, 0, CPU))


@pytest.mark.parametrize("dim", [0, 4])
def test_augmentation_needs_a_network_that_is_told(tiny_config, dim):
    config = tiny_config(training__augment=0.12, network__augment_dim=dim)
    with pytest.raises(ValueError, match=rf"training\.augment=0\.12 needs network\.augment_dim=9, not {dim}"):
        BatchSource(config, numbered(9), CPU)


# -- latents ----------------------------------------------------------------------------------------------------------


def latents(count: int = 17, *, mirrored: bool = True) -> LatentData:
    """Row i holds 10 + i everywhere, its mirror image -(10 + i): no pixel values, and no flip of the row."""
    values = torch.full((count, 1, 4, 4), 10.0) + torch.arange(count)[:, None, None, None]
    return LatentData(values, -values if mirrored else None, np.arange(count) % 3, "latents", ("0", "1", "2"))


def test_latents_are_used_as_they_are_and_mirrored_by_their_mirror_images(tiny_config):
    config = tiny_config(network__num_classes=3, training__label_dropout=0.0)
    batch = BatchSource(config, latents(), CPU).draw(0, (200, 0, 200))
    assert batch.y.dtype == torch.float32
    number = batch.y[:, 0, 0, 0].abs() - 10
    flipped = batch.y[:, 0, 0, 0] < 0
    assert torch.equal(batch.y.abs(), (number + 10)[:, None, None, None].expand(-1, 1, 4, 4))
    assert float(flipped.double().mean()) == pytest.approx(0.5, abs=0.08)
    assert batch.cond.labels.tolist() == (number.long() % 3).tolist()
    pixels = BatchSource(config, numbered(17), CPU).draw(0, (200, 0, 200))  # the same rows, flipped the same
    assert numbers(pixels) == number.long().tolist()
    assert torch.equal(pixels.y[:, 0, 0, 0] == 1.0, flipped)


def test_latents_without_mirror_images_are_drawn_unflipped_or_refused(tiny_config):
    batch = BatchSource(tiny_config(training__flip=False), latents(mirrored=False), CPU).draw(0, (20, 20, 0))
    assert bool((batch.y > 0).all())
    message = r"training\.flip=True but data 'latents' has no mirrored latents, and a mirrored latent is not"
    with pytest.raises(ValueError, match=message):
        BatchSource(tiny_config(), latents(mirrored=False), CPU)


def test_held_out_latents_are_unflipped_and_labelled(tiny_config):
    config = tiny_config(network__num_classes=3, training__held_out_rows=34)
    batch = held_out_batch(config, latents(), 2, CPU)
    number = (batch.y[:, 0, 0, 0] - 10).long().tolist()
    assert sorted(number) == sorted([*range(17)] * 2)
    assert batch.cond.labels.tolist() == [n % 3 for n in number]


# -- labels in every family -------------------------------------------------------------------------------------------

WIDE = {"network__encoder_width": 64, "network__decoder_widths": (64, 64, 64)}


@pytest.mark.parametrize(
    ("family", "changes"),
    [("ncsnpp", {"diffusion__precondition": "vp-eps"}), ("ddpmpp", {}), ("ldm", WIDE)],
)
def test_a_step_of_every_family_learns_from_the_labels_of_its_rows(tiny_config, tiny_data, family, changes):
    changes = {"network__family": family, "network__num_classes": 5, "network__augment_dim": 9, **changes}
    config = tiny_config(training__label_dropout=0.3, training__augment=0.5, **changes)
    torch.manual_seed(0)
    denoiser = build_denoiser(config)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # the last layers start near zero
    batch = BatchSource(config, tiny_data(4, classes=4), CPU).draw(0, (2, 2, 2))
    shown = batch.cond.labels.unique().tolist()
    assert -1 in shown
    sum(stage_losses(denoiser, batch)).backward()
    embedding = denoiser.network.encoders[0].embedding
    learned = embedding.label.weight.grad.abs().sum(0).nonzero()[:, 0].tolist()
    assert learned == [label for label in shown if label >= 0]  # class 4 is never seen
    told = batch.cond.augment.abs().sum(0).ne(0)
    assert torch.equal(embedding.augment.weight.grad.abs().sum(0).ne(0), told)

    held_out = held_out_batch(config, tiny_data(4, classes=4), 1, CPU)
    assert sorted(held_out.cond.labels.tolist()) == [0, 1, 2, 3]
    with torch.no_grad():
        kept = stage_losses(denoiser, held_out)[1]
        hidden = dataclasses.replace(held_out.cond, labels=torch.full((4,), -1))
        assert abs(float(kept - stage_losses(denoiser, dataclasses.replace(held_out, cond=hidden))[1])) > 1e-4
