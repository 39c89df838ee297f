"""The data: 32x32 binary pictures with one to three shapes from a catalogue.

python shapes.py        saves shapes.png: training pictures in colours
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

os.environ["MPLBACKEND"] = "agg"  # a notebook may ask for a backend that is not installed
from matplotlib.figure import Figure

SIZE = 32  # pixels, height and width of a picture
GRID = 4  # all sizes and places are multiples of this
KINDS = ("circle", "rectangle", "triangle", "line")
COLOURS = ((1, 0.6, 0), (0, 0.7, 1), (0.2, 0.8, 0.2), (0.9, 0.5, 0.9))  # of KINDS, to look at

# ==== 1. The catalogue: every legal shape =========================================================
# A mask is a bool array that just fits around its shape; True is shape. Lengths are in pixels.


def circle(diameter):
    """Pixels whose centre is within diameter / 2 of the middle: (diameter, diameter)."""
    middle = (diameter - 1) / 2  # between two pixels
    y, x = np.ogrid[-middle : middle + 1, -middle : middle + 1]
    return x * x + y * y <= diameter * diameter / 4


def triangle(height, rise):
    """A filled isosceles triangle, tip up, 2 pixels wide there: both sides move out by 1 pixel
    every rise rows. Returns (height, 2 * ceil(height / rise))."""
    half = -(-height // rise)  # half of the width, rounded up
    y, x = np.ogrid[:height, -half:half]
    return abs(x + 0.5) - 0.5 <= y // rise


def diagonal(length):
    """The main diagonal of a square and two pixels on either side: (length, length)."""
    y, x = np.ogrid[:length, :length]
    return abs(x - y) <= 2


def mirror_images(picture):
    """A picture (h, w) and its turned and mirrored copies, eight in all."""
    for a in (picture, picture.T):
        yield from (a, a[::-1], a[:, ::-1], a[::-1, ::-1])


def key(mask):
    """What a mask is looked up by: its size and its pixels."""
    return mask.shape, mask.tobytes()


SIDES = (8, 12, 16)
made = [("circle", circle(diameter)) for diameter in SIDES]
made += [("rectangle", np.ones((height, width), bool)) for height in SIDES for width in SIDES]
made += [("triangle", triangle(height, rise)) for height, rise in ((8, 1), (12, 2), (16, 2))]
made += [("line", np.ones((GRID, length), bool)) for length in range(12, SIZE + 1, GRID)]
made += [("line", diagonal(length)) for length in range(8, 25, GRID)]

CATALOGUE, KIND_OF = {kind: [] for kind in KINDS}, {}  # all mirror images, each mask once
for kind, mask in made:
    for image in mirror_images(mask):
        if key(image) not in KIND_OF:
            KIND_OF[key(image)] = kind
            CATALOGUE[kind].append(image)

# ==== 2. The data, for the model and for people ===================================================
# - Shapes lie on a grid of 4 pixels. An edge that is off by one pixel is always wrong.
# - No shape is small: 34 pixels at least. A smaller one would come later out of the noise.
# - Shapes keep apart, so that a picture can be read in one way only: an L could be two rectangles.


def draw_picture(kinds, rng):
    """A picture with a shape of each of these kinds: bool (32, 32), or None if they do not fit."""
    picture = np.zeros((SIZE, SIZE), dtype=bool)
    taken = np.zeros((SIZE, SIZE), dtype=bool)  # the boxes around the shapes
    for kind in kinds:
        mask = CATALOGUE[kind][rng.integers(len(CATALOGUE[kind]))]
        h, w = mask.shape
        for _ in range(30):  # tries, before the picture begins again
            y = GRID * rng.integers((SIZE - h) // GRID + 1)
            x = GRID * rng.integers((SIZE - w) // GRID + 1)
            # The boxes must not even touch, so the slice is one pixel larger on each side.
            if not taken[max(0, y - 1) : y + h + 1, max(0, x - 1) : x + w + 1].any():
                break
        else:
            return None
        picture[y : y + h, x : x + w] = mask
        taken[y : y + h, x : x + w] = True
    return picture


def make_dataset(n, seed):
    """n pictures, uint8 (n, 32, 32), background 0 and shape 1. seed: as for default_rng.

    36 % have one shape, 48 % two and 16 % three. Kinds, masks and places are uniform. If the shapes
    do not fit, all but the kinds are drawn again, as else kinds that need little room would win.
    """
    rng = np.random.default_rng(seed)
    pictures = np.zeros((n, SIZE, SIZE), dtype=np.uint8)
    for i in range(n):
        number = 1 + rng.binomial(2, 0.4)
        kinds = [KINDS[k] for k in rng.integers(len(KINDS), size=number)]
        picture = None
        while picture is None:
            picture = draw_picture(kinds, rng)
        pictures[i] = picture
    return pictures


def to_model(pictures):
    """0/1 pictures (n, 32, 32) -> a tensor, float32 (n, 1, 32, 32), background -1 and shape +1."""
    return torch.from_numpy(np.asarray(pictures, dtype=np.float32))[:, None] * 2 - 1


def from_model(x):
    """A tensor (n, 1, 32, 32), about [-1, 1] -> an array (n, 32, 32) in [0, 1], clipped."""
    return ((x[:, 0] + 1) / 2).clamp(0, 1).numpy()


def mirror(x, generator):
    """Mirrors each picture left-right with probability 1/2 (Ho, Appendix B): (n, 1, 32, 32)."""
    flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(flip, x.flip(3), x)


def tile(pictures, columns=8):
    """Pictures (n, h, w) or (n, h, w, 3), in [0, 1], 4 times as large, as one Pillow image."""
    h, w = 4 * pictures.shape[1] + 2, 4 * pictures.shape[2] + 2  # a grey line on each side
    columns = min(columns, len(pictures))
    sheet = Image.new("RGB", (w * columns, h * -(-len(pictures) // columns)), "gray")
    for i, picture in enumerate((pictures * 255).astype(np.uint8)):
        image = Image.fromarray(picture).resize((w - 2, h - 2), Image.Resampling.NEAREST)
        sheet.paste(image, (i % columns * w + 1, i // columns * h + 1))
    return sheet


def figure(width, height):
    """An empty matplotlib figure of this size in inches, which needs no screen."""
    return Figure(figsize=(width, height), layout="constrained")


# ==== 3. Is a picture right? ======================================================================


def find_blobs(picture):
    """The connected sets of pixels, also across corners: 0/1 (32, 32) -> list of bool (32, 32)."""
    shape = torch.from_numpy(np.array(picture, dtype=np.float32))[None]  # (1, 32, 32)
    label = shape * torch.arange(1, shape.numel() + 1).view(shape.shape)  # of each pixel its own
    while True:
        spread = shape * F.max_pool2d(label, 3, stride=1, padding=1)  # the largest in reach
        if torch.equal(spread, label):
            return [(label[0] == n).numpy() for n in label.unique() if n > 0]
        label = spread


def explain(picture):
    """Cuts a 0/1 picture (32, 32) into blobs and looks each up: a list of (kind or None, blob)."""
    found = []
    for blob in find_blobs(picture):
        rows, columns = blob.any(1).nonzero()[0], blob.any(0).nonzero()[0]
        cut = blob[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        found.append((KIND_OF.get(key(cut)), blob))
    return found


def score(x, training=()):
    """x: float (n, 1, 32, 32); above 0 is shape. training: uint8 (m, 32, 32), what was trained on.

    Returns the shares of "right" pictures, with one to three legal shapes and nothing else,
    "copies" of training pictures, also turned or mirrored, and "distinct" ones; and counts in right
    ones: "kinds", a list of 4 in the order of KINDS, and "numbers", with 1, 2 and 3 shapes.
    """
    pictures = (np.asarray(x)[:, 0] > 0).astype(np.uint8)  # (n, 32, 32)
    known = {picture.tobytes() for picture in training}
    copies = [p for p in pictures if any(m.tobytes() in known for m in mirror_images(p))]
    distinct = {picture.tobytes() for picture in pictures}
    found = [[kind for kind, _ in explain(picture)] for picture in pictures]
    right = [a for a in found if 1 <= len(a) <= 3 and None not in a]  # their kinds
    groups = {"right": right, "copies": copies, "distinct": distinct}
    shares = {name: len(group) / len(pictures) for name, group in groups.items()}
    kinds = [sum(a.count(kind) for a in right) for kind in KINDS]
    numbers = [sum(len(a) == n for a in right) for n in (1, 2, 3)]
    return {**shares, "kinds": kinds, "numbers": numbers}


def coloured(pictures):
    """0/1 pictures (n, 32, 32) -> (n, 32, 32, 3): blobs in COLOURS, red if in no catalogue."""
    images = np.zeros((*pictures.shape, 3), dtype=np.float32)
    for image, picture in zip(images, pictures):
        for kind, blob in explain(picture):
            image[blob] = COLOURS[KINDS.index(kind)] if kind else (1, 0, 0)
    return images


if __name__ == "__main__":
    tile(coloured(make_dataset(32, seed=0))).save("shapes.png")
