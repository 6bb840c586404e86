"""Pictures of masks. Data flows: `rendering` reads a mask into a `grid`, a `Picture` is drawn on a `canvas`."""

from attnreg.masks.picture.picture import Picture
from attnreg.masks.picture.rendering import render

__all__ = ["Picture", "render"]
