"""Random dropping: as many as asked, by the seed alone, and every place as likely as the next."""

from __future__ import annotations

import dataclasses

import families as tiny
import pytest
import torch
from specimens import forward_logits, model_of

import sightline as sl
from sightline.errors import InputError
from sightline.reduction.random_dropping import RandomDropping
from sightline.reduction.token_reducer import ImageTokens


def drawn(method: RandomDropping, n: int, index: int = 0) -> list[int]:
    keep, features = method.reduce(ImageTokens(torch.zeros(n, 3), index))
    assert features is None
    places: list[int] = keep.nonzero()[:, 0].tolist()
    return places


def test_the_seed_and_the_place_in_the_row_decide() -> None:
    method = RandomDropping(keep=0.25)
    first = drawn(method, 16)
    assert len(first) == 4
    assert drawn(method, 16) == first
    assert len({str(drawn(method, 16, index)) for index in range(20)}) > 15
    assert len({str(drawn(RandomDropping(keep=0.25, seed=seed), 16)) for seed in range(20)}) > 15


def test_every_place_is_as_likely_as_the_next() -> None:
    counts = torch.zeros(10)
    for seed in range(1000):
        counts[drawn(RandomDropping(keep=0.3, seed=seed), 10)] += 1
    assert counts.sum() == 3000
    assert (counts - 300).abs().max() < 75  # five standard deviations


def test_images_of_a_row_are_drawn_for_on_their_own_and_rows_alike() -> None:
    model = model_of("llava")
    with sl.attach(model, RandomDropping(keep=0.5)) as attachment:
        forward_logits(model, tiny.inputs("llava", model, images_per_row=[2, 0, 1]))
    assert attachment.kept is not None
    kept = [[image.tolist() for image in row] for row in attachment.kept]
    assert kept[0][0] == kept[2][0] == drawn(RandomDropping(keep=0.5), 16)
    assert kept[0][1] == drawn(RandomDropping(keep=0.5), 16, 1) != kept[0][0]


def test_settings() -> None:
    assert dataclasses.asdict(RandomDropping()) == {"keep": 0.25, "positions": "compact", "seed": 0}
    assert sl.parse_methods("random_dropping:keep=0.5,seed=3") == (RandomDropping(keep=0.5, seed=3),)
    for seed in (-1, 0.5):
        with pytest.raises(InputError, match="seed of random_dropping must"):
            RandomDropping(seed=seed)  # type: ignore[arg-type]
