"""Samples depend on seed, epoch and index only; samplers are exact over epochs and processes."""

import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader

from qat.data.samples import EpochSampler, Key, LazyLoader, Samples, ShareSampler
from qat.data.sources import Source

SIZE = 12


def source() -> Source:
    """Grey images of random pixels, the class of each its index."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, 16, 16), dtype=np.uint8)
    return Source(lambda i: Image.fromarray(pixels[i]), list(range(SIZE)), SIZE)


def noise(image: Image.Image) -> Tensor:
    """The mean of the image's pixels, and a number from every global generator."""
    drawn = (random.random(), float(np.random.random()), float(torch.rand(())))
    return torch.tensor([float(np.asarray(image).mean()), *drawn], dtype=torch.float64)


AUGMENTATION = create_transform(
    (3, 16, 16),
    is_training=True,
    auto_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    re_prob=0.25,
)


def pixels_of(image: Image.Image) -> Tensor:
    """Pixels as they are, channels last."""
    return torch.from_numpy(np.array(image))


def augmented(seed: int = 3, transform: Callable[..., Tensor] = AUGMENTATION) -> Samples:
    """The source under a random transform."""
    return Samples(source(), transform, seed, "RGB")


def positions(sampler_position: tuple[int, int], size: int = SIZE, seed: int = 3) -> EpochSampler:
    """A sampler at a fixed position."""
    return EpochSampler(size, seed, lambda: sampler_position)


def states() -> tuple[object, bytes, bytes]:
    """States of the generators of Python, NumPy and torch."""
    array = np.random.get_state(legacy=False)
    return random.getstate(), repr(array).encode(), torch.get_rng_state().numpy().tobytes()


EVERY_TRANSFORM = pytest.mark.parametrize("transform", [noise, AUGMENTATION], ids=["noise", "timm"])


@EVERY_TRANSFORM
def test_augmented_image_depends_neither_on_order_nor_on_global_generators(
    transform: Callable[..., Tensor],
) -> None:
    samples = augmented(transform=transform)
    first = [samples[1, index][0] for index in range(SIZE)]
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    second = {index: samples[1, index][0] for index in reversed(range(SIZE))}
    assert all(torch.equal(first[index], second[index]) for index in range(SIZE))


def test_augmentation_differs_between_seeds_epochs_and_images() -> None:
    drawn = [
        tuple(augmented(seed, noise)[epoch, index][0][1:].tolist())
        for seed in (0, 1, 2)
        for epoch in range(4)
        for index in range(SIZE)
    ]
    assert len(set(drawn)) == len(drawn) == 3 * 4 * SIZE
    for generator in range(3):  # each of the three is seeded anew
        assert len({numbers[generator] for numbers in drawn}) == len(drawn)


@EVERY_TRANSFORM
def test_global_generators_are_as_before_after_an_augmented_image(
    transform: Callable[..., Tensor],
) -> None:
    samples = augmented(transform=transform)
    before = states()
    _ = samples[2, 5]
    assert states() == before


def test_global_generators_are_as_before_after_a_transform_that_raises() -> None:
    def broken(image: Image.Image) -> Tensor:
        return torch.stack([noise(image)][1:])

    samples = augmented(transform=broken)  # before, since beartype draws from Python's generator
    before = states()
    with pytest.raises(RuntimeError, match="non-empty"):
        _ = samples[2, 5]
    assert states() == before


def test_batches_are_the_same_with_and_without_workers() -> None:
    def batches(num_workers: int) -> list[list[Tensor]]:
        loader = DataLoader(
            augmented(), batch_size=5, sampler=positions((2, 0)), num_workers=num_workers
        )
        return list(loader)

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(shared) == 3
    for (images, labels), (other_images, other_labels) in zip(alone, shared, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_image_by_plain_index_has_its_pixels_and_label_in_the_asked_mode() -> None:
    for mode, channels in (("L", 1), ("RGB", 3)):
        samples = Samples(source(), pixels_of, 0, mode)
        assert len(samples) == SIZE
        for index in (0, 7):
            image, label = samples[index]
            grey = torch.from_numpy(np.array(source()[index][0]))
            assert label == index
            assert torch.equal(
                image.reshape(16, 16, channels), grey[..., None].expand(-1, -1, channels)
            )


def test_image_by_key_has_the_label_of_its_index() -> None:
    assert [augmented()[4, index][1] for index in range(SIZE)] == list(range(SIZE))


def test_epoch_is_a_permutation_of_all_images_with_the_epoch_in_each_key() -> None:
    keys = list(positions((4, 0)))
    assert len(positions((4, 0))) == SIZE
    assert [epoch for epoch, _ in keys] == [4] * SIZE
    assert sorted(index for _, index in keys) == list(range(SIZE))
    assert [index for _, index in keys] != list(range(SIZE))


def test_order_is_fixed_by_seed_and_epoch_and_differs_with_either() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        np.random.seed(seed + 100 * epoch)
        torch.manual_seed(epoch)
        return tuple(index for _, index in positions((epoch, 0), 50, seed))

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    np.random.seed(99)
    assert tuple(index for _, index in positions((2, 0), 50, 1)) == orders[1, 2]


@pytest.mark.parametrize("done", [0, 1, 5, SIZE])
def test_pass_continues_after_the_samples_already_seen(done: int) -> None:
    assert list(positions((3, done))) == list(positions((3, 0)))[done:]


def test_position_is_asked_anew_at_every_pass() -> None:
    where = [(0, 7)]
    sampler = EpochSampler(SIZE, 3, lambda: where[-1])
    resumed = list(sampler)
    where.append((1, 0))
    assert resumed == list(positions((0, 7)))
    assert list(sampler) == list(positions((1, 0)))


def test_lazy_loader_asks_for_the_position_only_with_the_first_batch() -> None:
    asked: list[int] = []
    epoch = 0

    def position() -> tuple[int, int]:
        asked.append(epoch)
        return epoch, 0

    sampler = EpochSampler(SIZE, 3, position)
    lazy = LazyLoader(DataLoader(augmented(transform=noise), batch_size=4, sampler=sampler))
    assert len(lazy) == 3
    batches = iter(lazy)
    assert asked == []
    epoch = 2  # such as a run that is resumed after the iterator was made
    labels = torch.cat([batch[1] for batch in batches]).tolist()
    assert asked == [2]
    assert labels == [index for _, index in positions((2, 0))]


def _rank(rank: int, world: int, folder: Path, sizes: tuple[int, ...], done: int) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    found = {}
    for size in sizes:
        epoch, resumed, share = (
            positions((1, 0), size),
            positions((1, done), size),
            ShareSampler(size),
        )
        found[size] = (len(epoch), list(epoch), list(resumed), len(share), list(share))
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()  # a process that leaves early breaks the connections of a slower one
    dist.destroy_process_group()


Shares = dict[int, list[tuple[int, list[Key], list[Key], int, list[int]]]]


@pytest.fixture(scope="module", params=[2, 3])
def shares(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shares:
    """What the samplers yield in every process of a real gloo group, by size of the data set."""
    folder, context = tmp_path_factory.mktemp("gloo"), multiprocessing.get_context("fork")
    sizes = (1, 2, 7, 12)
    arguments = [(rank, request.param, folder, sizes, 2) for rank in range(request.param)]
    processes = [context.Process(target=_rank, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * request.param
    found = [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]
    return {size: [each[size] for each in found] for size in sizes}


def test_processes_train_on_equal_disjoint_shares_of_the_same_order(shares: Shares) -> None:
    for size, ranks in shares.items():
        order, world = list(positions((1, 0), size)), len(ranks)
        taken = [key for _, keys, *_ in ranks for key in keys]
        assert {len(keys) for _, keys, *_ in ranks} == {size // world}
        assert {length for length, *_ in ranks} == {size // world}
        # Together the first images of the order, less than `world` are left out at its end.
        assert sorted(taken) == sorted(order[: size // world * world])


def test_every_process_continues_after_the_samples_it_has_seen(shares: Shares) -> None:
    for ranks in shares.values():
        for _, keys, resumed, *_ in ranks:
            assert resumed == keys[2:]


def test_processes_evaluate_every_image_exactly_once(shares: Shares) -> None:
    for size, ranks in shares.items():
        parts = [part for *_, part in ranks]
        assert sorted(index for part in parts for index in part) == list(range(size))
        assert all(part == sorted(part) for part in parts)
        assert [length for *_, length, _ in ranks] == [len(part) for part in parts]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_single_process_evaluates_all_images_in_order() -> None:
    assert list(ShareSampler(5)) == [0, 1, 2, 3, 4]
    assert len(ShareSampler(5)) == 5
