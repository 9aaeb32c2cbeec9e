"""The colours of a sampling process: the later a token appeared, the darker it is (paper, Tables 3, 13 and 14)."""

from __future__ import annotations

Colour = tuple[int, int, int]

_BLUES: tuple[Colour, ...] = ((226, 238, 250), (158, 202, 225), (66, 146, 198), (8, 81, 156), (8, 36, 84))
"""One hue from light to dark, which is read alike with any colour vision, and in grey."""

_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


def shade(step: int, steps: int) -> tuple[str, str]:
    """The background and the ink of a token, as `#rrggbb`.

    Args:
        step: at which it appeared, from 1.
        steps: of the whole process; the last one is the darkest.
    """
    share = 0.0 if steps <= 1 else min(max((step - 1) / (steps - 1), 0.0), 1.0)
    background = _mixed(share)
    ink = max((_BLACK, _WHITE), key=lambda colour: contrast(colour, background))
    return _hex(background), _hex(ink)


def contrast(one: Colour, other: Colour) -> float:
    """Ratio of luminances, 1 to 21 (WCAG 2.1); 4.5 is enough for text."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _mixed(share: float) -> Colour:
    place = share * (len(_BLUES) - 1)
    index = min(int(place), len(_BLUES) - 2)
    left, right = _BLUES[index], _BLUES[index + 1]
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(left, right, strict=True))
    return red, green, blue


def _luminance(colour: Colour) -> float:
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
