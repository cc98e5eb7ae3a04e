"""Checks of a plot's file."""

import numpy as np


def is_drawn(file) -> bool:
    """Whether a PNG has at least 200 coloured pixels: axes, text and background are grey."""
    from matplotlib.image import imread

    red_green_blue = imread(file)[..., :3]
    return bool((np.ptp(red_green_blue, axis=-1) > 0.2).sum() >= 200)
