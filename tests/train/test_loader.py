"""Sample order is a function of seed and step; processes and micro-batches only cut it."""

import pytest
import torch

from train import loader


@pytest.mark.parametrize(
    ("images", "world", "micro"), [(8, 1, None), (8, 2, None), (7, 2, 2), (12, 3, 2), (5, 4, 1), (9, 2, 4)]
)
def test_processes_share_the_total_batch_without_overlap(images, world, micro):
    shares = [loader.share(images, world, rank, micro) for rank in range(world)]
    assert sorted(i for offsets in shares for part in offsets for i in part) == list(range(images))
    assert len({len(offsets) for offsets in shares}) == 1, "a different number of micro-batches would hang"
    assert all(len(part) > 0 for offsets in shares for part in offsets)


def test_micro_batches_are_no_larger_than_asked():
    assert max(len(part) for part in loader.share(64, 2, 0, 10)) <= 10


def test_fewer_images_than_processes_is_an_error():
    with pytest.raises(ValueError, match="optim.global_batch 2 is less than the 4 processes"):
        loader.share(2, 4, 0)


def test_every_pass_is_another_permutation():
    order = loader.Order(10, seed=3)
    first, second = ([order[i] for i in range(start, start + 10)] for start in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [loader.Order(10, seed=3)[i] for i in range(10)] == first
    assert [loader.Order(10, seed=4)[i] for i in range(10)] != first


def test_repeated_augmentation_draws_each_sample_in_a_row():
    order = loader.Order(9, seed=0, repeats=3)
    drawn = [order[i] for i in range(9)]
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3] and len(set(drawn)) == 3


def test_a_resumed_order_goes_on_where_the_other_one_would_be():
    offsets = loader.share(4, 1, 0, 2)
    whole = list(loader.Steps(loader.Order(10, 0), 0, 6, 4, offsets))
    rest = list(loader.Steps(loader.Order(10, 0), 4, 6, 4, offsets))
    assert whole[8:] == rest and len(whole) == 12


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_counts_every_sample_once(world):
    data = [{"image": torch.full((1,), float(i)), "path": str(i)} for i in range(11)]
    seen, rounds = [], []
    for rank in range(world):
        batches = list(loader.evaluation_batches(data, 2, world, rank, workers=0, pin=False))
        rounds.append(len(batches))
        seen += [int(value) for counts, batch in batches if counts for value in batch["image"].flatten()]
    assert sorted(seen) == list(range(11))
    assert len(set(rounds)) == 1, "every process runs the model equally often"


def test_collate_keeps_maps_of_different_sizes_apart():
    samples = [{"image": torch.zeros(3, 4, 4), "mask": torch.zeros(size), "label": 1, "path": "a"} for size in ((4, 4), (5, 4))]
    batch = loader.collate(samples)
    assert batch["image"].shape == (2, 3, 4, 4) and [m.shape[0] for m in batch["mask"]] == [4, 5]
    assert batch["label"].tolist() == [1, 1] and batch["path"] == ["a", "a"]


@pytest.mark.parametrize(("images", "world", "micro", "group"), [(8, 2, 2, 2), (9, 2, 4, 2), (1024, 8, 64, 6), (7, 1, None, 4)])
def test_groups_are_never_cut(images, world, micro, group):
    shares = [loader.share(images, world, rank, micro, group) for rank in range(world)]
    parts = [part for offsets in shares for part in offsets]
    assert [i for part in parts for i in part] == list(range(images)) and len({len(offsets) for offsets in shares}) == 1
    assert all(part.start % group == 0 for part in parts) and (micro is None or max(map(len, parts)) <= micro)
    whole = loader.partners(images, group // 2)
    assert torch.equal(torch.cat([loader.partners(len(part), group // 2) + part.start for part in parts]), whole)


def test_partners_are_pairs_of_different_images():
    order = loader.Order(1000, seed=0, repeats=3)
    partner = loader.partners(60, repeats=3)
    assert torch.equal(partner[partner], torch.arange(60)) and not (partner == torch.arange(60)).any()
    assert all(order[i] != order[int(partner[i])] for i in range(60))
    assert loader.partners(5).tolist() == [1, 0, 3, 2, 4]


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"optim.micro_batch 4 is less than the 6 images .*twice data.repeats"):
        loader.share(64, 1, 0, 4, 6)
    with pytest.raises(ValueError, match=r"optim.global_batch 6 is less than one group of 4 \(mixup, cutmix\) for each of 3"):
        loader.share(6, 3, 0, None, 4)
