"""Colours of steps: an order that everyone sees, and text that can be read on them."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_rgb

from llada_lightning.generation.pictures.ink import contrast, shade


def rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in to_rgb(colour))
    return red, green, blue


@pytest.mark.parametrize("steps", [2, 7, 128])
def test_a_later_step_is_darker_and_its_text_readable(steps: int) -> None:
    shades = [shade(step, steps) for step in range(1, steps + 1)]
    against_black = [contrast(rgb(background), (0, 0, 0)) for background, _ in shades]
    assert against_black == sorted(against_black, reverse=True)
    assert against_black[0] > 15 and against_black[-1] < 1.6
    assert all(contrast(rgb(background), rgb(ink)) >= 4.5 for background, ink in shades)
    assert shades[0][1] == "#000000" and shades[-1][1] == "#ffffff"


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)  # WCAG's well-known grey


def test_one_step_is_light() -> None:
    assert shade(1, 1) == shade(1, 9)
    assert shade(12, 9) == shade(9, 9)
