from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.config.sampling import SOLVERS
from multistage_diffusion.errors import UserError
from multistage_diffusion.samplers import make_plan, sample, start_noise
from multistage_diffusion.samplers.sampling import sample_images
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.vp import VP

SHAPE = (1, 3, 4)
CONFIG = SamplingConfig(solver="heun", calls=9, spacing="edm", sigma_min=0.01, sigma_max=20.0)


def gaussian(x, sigma, cond=None):
    """The exact denoiser of N(0.2, 0.3²), moved by a hundredth per class."""
    mean = 0.2 if cond is None else 0.2 + 0.1 * cond.labels.to(x.dtype)[:, None, None, None]
    return (0.09 * x + sigma**2 * mean) / (0.09 + sigma**2)


def draw(count=7, *, config=CONFIG, **options):
    return sample_images(gaussian, SHAPE, count, config=config, schedule=EDM(), **options)


def test_images_are_the_sampler_s_end_as_pixels():
    plan = make_plan(CONFIG, EDM())
    end = sample(gaussian, start_noise(5, torch.arange(7), SHAPE, plan), plan)
    expected = ((end + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(draw(seed=5), expected)
    assert expected.shape == (7, *SHAPE)


@pytest.mark.parametrize("churn", [0.0, 5.0])
def test_a_sample_depends_on_its_seed_and_number_alone(churn):
    config = SamplingConfig(solver="heun", calls=9, spacing="edm", sigma_min=0.01, sigma_max=20.0, churn=churn)
    images = draw(7, config=config)
    assert torch.equal(draw(7, config=config, batch=3), images)
    assert torch.equal(draw(4, config=config, batch=1), images[:4])
    assert not torch.equal(draw(7, config=config, seed=1), images)
    assert len({bytes(i.numpy().tobytes()) for i in images}) == 7


def test_many_samples_have_the_data_s_mean_and_spread():
    x = draw(4000, config=SamplingConfig(calls=20, sigma_min=0.002, sigma_max=80.0)).float() / 127.5 - 1
    assert float(x.mean()) == pytest.approx(0.2, abs=0.01)
    assert float(x.std()) == pytest.approx(0.3, abs=0.01)


def test_labels_follow_their_samples_through_the_batches():
    labels = torch.tensor([0, 3, 1, 2, 0])
    images = draw(5, labels=labels, batch=2)
    for i, label in enumerate(labels.tolist()):
        alone = draw(5, labels=torch.full((5,), label))
        assert torch.equal(images[i], alone[i])
    assert not torch.equal(images, draw(5))


def test_guidance_moves_the_samples_as_the_closed_form_says():
    labels = torch.tensor([0, 3, 1])
    for weight in (0.0, 1.0, 2.0):

        def guided(
            x, sigma, cond, weight=weight
        ):  # equally wide Gaussians: N(0.1, 0.3²) without a label, see `gaussian`
            mean = 0.1 + weight * 0.1 * (cond.labels.to(x.dtype)[:, None, None, None] + 1)
            return (0.09 * x + sigma**2 * mean) / (0.09 + sigma**2)

        images = draw(3, labels=labels, batch=2, config=replace(CONFIG, guidance=weight))
        expected = sample_images(guided, SHAPE, 3, config=CONFIG, schedule=EDM(), labels=labels)
        assert float((images.float() - expected.float()).abs().max()) <= 1


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_guidance_without_labels_is_refused_before_any_work(weight):
    with pytest.raises(ValueError, match=rf"sampling\.guidance={weight}: there are no class labels"):
        draw(2, config=replace(CONFIG, guidance=weight), progress=lambda *_: pytest.fail("a call was made"))


def test_end_states_are_decoded_batch_by_batch_before_they_become_pixels():
    seen = []

    def decode(z):
        seen.append(z)
        return z.repeat_interleave(2, dim=-1)[:, [0, 0, 0]] * 0.5

    images = draw(5, batch=2, decode=decode)
    plan = make_plan(CONFIG, EDM())
    z = sample(gaussian, start_noise(0, torch.arange(5), SHAPE, plan), plan)
    torch.testing.assert_close(torch.cat(seen), z)
    assert [len(z) for z in seen] == [2, 2, 1]
    expected = ((z * 0.5 + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(images, expected.repeat_interleave(2, dim=-1).expand(5, 3, 3, 8))


def test_decoders_build_no_graph():
    weight = torch.ones(1, requires_grad=True)
    draw(2, decode=lambda z: z * weight if not torch.is_grad_enabled() else pytest.fail("gradients are on"))


def test_progress_counts_samples_and_parts_of_them():
    seen = []
    draw(5, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {5}
    assert len(seen) == 3 * 9  # told after each call of each batch
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (5, 5)
    assert seen[8] == (2, 5)  # the first batch of two is through


@pytest.mark.parametrize(("count", "batch", "named"), [(0, 4, "count=0"), (-1, 4, "count=-1"), (3, 0, "batch=0")])
def test_impossible_counts_are_refused(count, batch, named):
    with pytest.raises(ValueError, match=f"^{named} must be positive"):
        draw(count, batch=batch)


def test_the_network_may_be_of_less_precision_but_not_the_trajectory():
    seen = []

    def network(x, sigma, cond=None):
        seen.append((x.dtype, torch.nn.functional.linear(x.flatten(1), torch.eye(12)).dtype))
        return gaussian(x, sigma)

    def run(autocast):
        images = sample_images(network, SHAPE, 3, config=CONFIG, schedule=EDM(), autocast=autocast)
        found = set(seen)
        seen.clear()
        return images, found

    plain, reduced = run(None), run(torch.bfloat16)
    assert plain[1] == {(torch.float32, torch.float32)}
    assert reduced[1] == {(torch.float32, torch.bfloat16)}
    assert torch.equal(plain[0], reduced[0])


def test_finished_batches_are_handed_on_while_the_next_is_drawn():
    batches, drawing = [], threading.Event()

    def finished(first, images):
        if first == 0:
            assert drawing.wait(20)  # the next batch has begun
        batches.append((first, images, threading.current_thread()))

    def progress(done, total):
        if done > 2:
            drawing.set()

    images = draw(5, batch=2, finished=finished, progress=progress)
    assert [first for first, _, _ in batches] == [0, 2, 4]
    assert torch.equal(torch.cat([part for _, part, _ in batches]), images)
    assert all(thread is not threading.current_thread() for _, _, thread in batches)


@pytest.mark.parametrize("batch", [0, 2])
def test_what_fails_to_be_written_ends_the_drawing(batch):
    seen = []

    def finished(first, images):
        if first == 2 * batch:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        draw(6, batch=2, finished=finished, progress=lambda done, _: (time.sleep(0.02), seen.append(done)))
    assert (seen[-1] < 6) == (batch == 0)  # at once, where there is more to draw


def test_a_guidance_interval_and_thresholding_reach_the_sampler():
    labels = torch.tensor([0, 3, 1])
    every = draw(3, labels=labels, config=replace(CONFIG, guidance=3.0))
    whole = draw(3, labels=labels, config=replace(CONFIG, guidance=3.0, guidance_interval=(0.0, 30.0)))
    nowhere = draw(3, labels=labels, config=replace(CONFIG, guidance=3.0, guidance_interval=(30.0, 40.0)))
    some = draw(3, labels=labels, config=replace(CONFIG, guidance=3.0, guidance_interval=(0.1, 1.0)))
    assert torch.equal(whole, every)
    assert torch.equal(nowhere, draw(3, labels=labels))
    assert not torch.equal(some, every)
    assert not torch.equal(some, nowhere)
    strong = replace(CONFIG, guidance=12.0)
    clipped, within = (
        draw(3, labels=labels, config=strong),
        draw(3, labels=labels, config=replace(strong, threshold=0.9)),
    )
    assert (clipped[1] == 255).all()
    assert not (within[1] == 255).all()


def test_thresholding_of_latents_is_refused_before_any_work():
    with pytest.raises(ValueError, match=r"sampling\.threshold=0\.9: dynamic thresholding is of pixels.* leave it out"):
        draw(
            2,
            config=replace(CONFIG, threshold=0.9),
            decode=lambda z: z,
            progress=lambda *_: pytest.fail("a call was made"),
        )


def test_the_last_call_counts_and_removes_the_noise():
    def two_grey_levels(x, sigma, cond=None):
        return torch.where(x > 0, 0.6, -0.6).to(x.dtype)

    def draw_at(choice):
        seen = []
        config = SamplingConfig(solver="ddim", calls=10, sigma_min=0.04, sigma_max=20.0, denoise_last=choice)
        images = sample_images(
            two_grey_levels, SHAPE, 3, config=config, schedule=EDM(), progress=lambda *done: seen.append(done)
        )
        assert seen[-1] == (3, 3)
        return {int(v) for v in images.flatten()}

    assert draw_at("auto") == draw_at("always") == {51, 204}
    assert len(draw_at("never")) > 5


def test_clipping_bounds_the_images_of_every_solver_and_ddim_keeps_the_noise_of_the_image_before() -> None:
    far = lambda x, sigma, cond=None: torch.full_like(x, 3.0)  # noqa: E731
    settings = {"calls": 4, "sigma_min": 0.01, "sigma_max": 5.0, "denoise_last": "always", "clip": 0.5}
    for solver in ("ddim", "dpm++", "heun"):
        config = SamplingConfig(solver=solver, order=1, **settings)
        images = sample_images(far, (1, 2, 2), 2, config=config, schedule=VP())
        assert images.unique().tolist() == [round((0.5 + 1) * 127.5)], solver
    x = torch.randn(1, 1, 2, 2)
    step = replace(make_plan(SamplingConfig(solver="ddim", **settings), VP()).steps[0], clip=0.5)
    after = SOLVERS["ddim"]().step(x, step, lambda x, sigma: far(x, sigma), lambda x: x)
    torch.testing.assert_close(after, 0.5 + step.end / step.calls[0] * (x - 3.0))


def test_clipping_of_latents_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match=r"sampling\.clip=1\.0: clipping is of pixels"):
        sample_images(
            lambda x, sigma, cond=None: x,
            (1, 2, 2),
            1,
            config=SamplingConfig(clip=1.0),
            schedule=VP(),
            decode=lambda x: x,
        )
