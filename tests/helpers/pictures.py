"""What a plot's file holds."""

import numpy as np


def is_drawn(file) -> bool:
    """Whether a PNG has more on it than axes, text and the background, which are grey: 200 coloured pixels or more."""
    from matplotlib.image import imread

    red_green_blue = imread(file)[..., :3]
    return bool((np.ptp(red_green_blue, axis=-1) > 0.2).sum() >= 200)
