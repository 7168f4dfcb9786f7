"""Are drawn images copies of training images? The nearest one of each, and a page of pairs.

Vectors     pixel_vectors; those of any other space will do
Nearest     nearest: the nearest training image of each image; its mirror image counts, too
Figures     compare: drawn images beside real ones that were not trained on
Page        write_page

Needs torch, Pillow and Jinja2.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffuser_lib.files import write_atomically
from diffuser_lib.images import to_pil

# ---- Vectors -----------------------------------------------------------------------------------

SIDE = 64                                                        # pixels: larger images are compared at this size


def pixel_vectors(images: Tensor) -> Tensor:
    """Images uint8 [N, C, H, W] as float [N, D]: the length of a difference is its root mean square in grey levels."""
    height, width = images.shape[2:]
    factor = min(1, SIDE / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))

    parts = []
    for part in images.split(500):
        x = part.float()
        if factor < 1:
            x = F.interpolate(x, size, mode="area")
        x = x.flatten(1)
        parts.append(x / x.shape[1] ** 0.5)
    return torch.cat(parts)


# ---- Nearest -----------------------------------------------------------------------------------


@dataclass
class Nearest:
    """The nearest training image of each of N images, in one space.

    distance: float [N]; index: int64 [N], of the training image; mirrored: bool [N], whether its mirror image is meant.
    """

    distance: Tensor
    index: Tensor
    mirrored: Tensor

    def __getitem__(self, chosen) -> Nearest:
        return Nearest(self.distance[chosen], self.index[chosen], self.mirrored[chosen])


def nearest(vectors: Tensor, mirrored: Tensor, training: Tensor, itself: Tensor | None = None) -> Nearest:
    """The training image nearest to each image. vectors, mirrored: of the images and of their mirrors [N, D].

    training: of the training images [M, D].
    itself: int64 [N], the place among the training images that an image has itself, which is passed over.
    """
    best = []
    for queries in (vectors, mirrored):
        found = []
        for start, part in enumerate(queries.split(500)):
            distances = torch.cdist(part, training)
            if itself is not None:
                own = itself[500 * start : 500 * start + len(part)]
                distances[torch.arange(len(part)), own] = torch.inf
            found.append(distances.min(1))
        best.append((torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])))

    (plain, plain_index), (flipped, flipped_index) = best
    is_mirrored = flipped < plain
    return Nearest(torch.where(is_mirrored, flipped, plain), torch.where(is_mirrored, flipped_index, plain_index),
                   is_mirrored)


# ---- Figures -----------------------------------------------------------------------------------

RARE = 0.01                                                      # of real images lie nearer than the limit


@dataclass
class Comparison:
    """Drawn images beside real ones, in one space.

    space: its name; drawn, real: Nearest of each; limit: the distance that one real image in a hundred stays below;
    doubles: real images left out because the same one is in the training set again.
    """

    space: str
    drawn: Nearest
    real: Nearest
    limit: float
    doubles: int

    def suspicious(self) -> Tensor:
        """Which drawn images lie below the limit: bool [N]."""
        return self.drawn.distance <= self.limit

    def figures(self) -> dict[str, float]:
        """The numbers, by name."""
        return {
            f"nearest by {self.space}, median": self.drawn.distance.median().item(),
            f"nearest by {self.space}, real images": self.real.distance.median().item(),
            f"nearer by {self.space} than 99% of real images": self.suspicious().double().mean().item(),
        }


def compare(space: str, drawn: Nearest, real: Nearest) -> Comparison:
    """Drawn images beside real ones that were not trained on (or were passed over)."""
    different = real.distance > 0.01 * real.distance.median()         # the same but for rounding
    doubles = 0
    if different.any():
        doubles = int((~different).sum())
        real = real[different]
    limit = real.distance.quantile(RARE).item()
    return Comparison(space, drawn, real, limit, doubles)


# ---- Page --------------------------------------------------------------------------------------

MOST_PAIRS = 100

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Nearest training images</title>
<style>
:root { color-scheme: light dark; --muted: #59616a; --line: #d8dce0; --alarm: #a8321a }
@media (prefers-color-scheme: dark) { :root { --muted: #a2abb4; --line: #363c43; --alarm: #f0907a } }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 70rem; font: 1rem/1.55 system-ui, sans-serif;
       overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.6rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1.5rem; padding: 0 }
.pair { display: flex; gap: .5rem; margin: 0 }
.pair figure { margin: 0; flex: 1; font-size: .8125rem; color: var(--muted) }
.pair figure .near { color: var(--alarm); font-weight: 600 }
img { display: block; width: 100%; image-rendering: pixelated }
</style>
</head>
<body>
<h1>Nearest training images</h1>
<p>{{ title }}</p>
<table>
{% for name, value in rows %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>
<p>In each row of three, the drawn image is on the left. Beside it is the training image nearest to it, by each of the
two measures; mirror images count. Bold: nearer than 99 in 100 real images are to theirs. Even where nothing is copied,
about one image in a hundred is this near.</p>
<div class="pairs">
{% for pair in pairs %}<div class="pair">
{% for picture in pair %}<figure><img src="{{ picture.source }}" alt="{{ picture.name }}">
<figcaption{% if picture.near %} class="near"{% endif %}>{{ picture.name }}</figcaption></figure>
{% endfor %}</div>
{% endfor %}</div>
</body>
</html>
"""


def as_source(image: Tensor) -> str:
    """An image uint8 [C, H, W] as the source of an <img>."""
    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def write_page(path: Path, title: str, names: list[str], drawn: Tensor, training: Tensor,
               comparisons: list[Comparison]) -> None:
    """The drawn images uint8 [N, C, H, W] with their nearest training images [M, C, H, W], the nearest pair first.

    names: of the drawn images. Raises OSError.
    """
    import jinja2

    # The nearest first, by whichever measure finds it nearer.
    closeness = torch.stack([c.drawn.distance / max(c.limit, 1e-9) for c in comparisons]).amin(0)
    suspicious = [c.suspicious() for c in comparisons]
    pairs = []
    for i in closeness.argsort().tolist()[:MOST_PAIRS]:
        pair = [dict(source=as_source(drawn[i]), name=names[i], near=False)]
        for c, near in zip(comparisons, suspicious, strict=True):
            image = training[c.drawn.index[i]]
            is_mirrored = c.drawn.mirrored[i].item()
            caption = f"by {c.space}: {c.drawn.distance[i]:.3g}{', mirrored' if is_mirrored else ''}"
            pair.append(dict(source=as_source(image.flip(-1) if is_mirrored else image), name=caption,
                             near=near[i].item()))
        pairs.append(pair)

    rows = []
    for c in comparisons:
        rows += [(name, f"{value:.3g}") for name, value in c.figures().items()]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(TEMPLATE).render(title=title, rows=rows, pairs=pairs)
    write_atomically(path, lambda file: file.write(html.encode("utf-8", errors="replace")))
