"""The data: 32x32 binary pictures with one to three shapes from a catalogue.

python shapes.py        saves shapes.png (data in colours) and catalogue.png (every shape)
"""

import numpy as np
import torch
from PIL import Image

SIZE = 32  # pixels, height and width of a picture
GRID = 4  # all sizes and places are multiples of this
KINDS = ("circle", "rectangle", "triangle", "line")
COLOURS = ((1, 0.6, 0), (0, 0.7, 1), (0.2, 0.8, 0.2), (0.9, 0.5, 0.9))  # of KINDS, to look at
MAX_SHAPES = 3
MORE = 0.4  # the probability of the second shape, and of the third
TRIES = 30  # positions tried for a shape before its picture begins again

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
    """What a mask is looked up by: its size and its pixels, as something that can be hashed."""
    return mask.shape, mask.tobytes()


def make_catalogue():
    """{kind: list of masks}, with all mirror images and each mask once."""
    sides = (8, 12, 16)
    made = [("circle", circle(diameter)) for diameter in sides]
    made += [("rectangle", np.ones((height, width), bool)) for height in sides for width in sides]
    made += [("triangle", triangle(height, rise)) for height, rise in ((8, 1), (12, 2), (16, 2))]
    made += [("line", np.ones((GRID, length), bool)) for length in range(12, SIZE + 1, GRID)]
    made += [("line", diagonal(length)) for length in range(8, 25, GRID)]
    catalogue = {kind: {} for kind in KINDS}
    for kind, mask in made:
        for image in mirror_images(mask):
            catalogue[kind].setdefault(key(image), image)
    return {kind: list(masks.values()) for kind, masks in catalogue.items()}


CATALOGUE = make_catalogue()
KIND_OF = {key(mask): kind for kind in KINDS for mask in CATALOGUE[kind]}

# ==== 2. The data set =============================================================================
# Four rules make the task clear, for the model and the score:
# - Shapes lie on a grid of 4 pixels. An edge that is off by one pixel is always wrong.
# - No shape is small: 34 pixels at least. A smaller one would come later out of the noise.
# - Shapes keep apart, so that a picture can be read in one way only: an L could be two rectangles.
# - Every picture has one shape. Each of two more is added with probability 0.4.


def draw_picture(kinds, rng):
    """A picture with a shape of each of these kinds: bool (32, 32), or None if they do not fit."""
    picture = np.zeros((SIZE, SIZE), dtype=bool)
    taken = np.zeros((SIZE, SIZE), dtype=bool)  # the boxes around the shapes
    for kind in kinds:
        masks = CATALOGUE[kind]
        mask = masks[rng.integers(len(masks))]
        h, w = mask.shape
        for _ in range(TRIES):
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

    36 % have one shape, 48 % two and 16 % three. Kinds, masks and places are uniform; masks and
    places are drawn again if the shapes do not fit.
    """
    rng = np.random.default_rng(seed)
    pictures = np.zeros((n, SIZE, SIZE), dtype=np.uint8)
    for i in range(n):
        number = 1 + rng.binomial(MAX_SHAPES - 1, MORE)
        kinds = [KINDS[k] for k in rng.integers(len(KINDS), size=number)]
        # No room: again with the same kinds. With new ones, kinds that need little room would win.
        picture = None
        while picture is None:
            picture = draw_picture(kinds, rng)
        pictures[i] = picture
    return pictures


# ==== 3. What the model sees, and what people see =================================================


def to_model(pictures):
    """0/1 pictures (n, 32, 32) -> a tensor, float32 (n, 1, 32, 32), background -1 and shape +1."""
    return torch.from_numpy(np.asarray(pictures, dtype=np.float32))[:, None] * 2 - 1


def from_model(x):
    """A tensor (n, 1, 32, 32), about [-1, 1] -> an array (n, 32, 32) in [0, 1], clipped."""
    return ((x[:, 0] + 1) / 2).clamp(0, 1).numpy()


def mirror(x, generator):
    """Mirrors each picture at random, left-right, up-down and along the diagonal: (n, 1, 32, 32).

    BEYOND THE PAPER, which mirrors left-right only. Here all eight mirror images are legal, but
    left-right only gives as many right samples (96.8 and 97.0 % of 3000).
    """
    coins = torch.rand(3, len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
    x = torch.where(coins[0], x.flip(3), x)
    x = torch.where(coins[1], x.flip(2), x)
    return torch.where(coins[2], x.transpose(2, 3), x)


def tile(pictures, columns=8, scale=4):
    """Pictures (n, h, w) or (n, h, w, 3), in [0, 1], side by side as one array, with grey lines
    between them. Every pixel becomes scale x scale pixels."""
    columns = min(columns, len(pictures))
    cells = pictures.astype(np.float32).repeat(scale, 1).repeat(scale, 2)
    edges = [(0, -len(cells) % columns), (1, 1), (1, 1), (0, 0)]
    cells = np.pad(cells, edges[: cells.ndim], constant_values=0.5)
    return np.vstack([np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)])


def to_image(grid):
    """An array (height, width) or (height, width, 3), in [0, 1], as a Pillow image, for save."""
    return Image.fromarray((grid * 255).astype(np.uint8))


# ==== 4. Is a picture right? ======================================================================


def find_blobs(picture):
    """The connected sets of pixels, also across corners: bool (32, 32) -> list of (32, 32)."""
    left = {(y, x) for y, x in np.argwhere(picture).tolist()}
    blobs = []
    while left:
        blob = np.zeros(picture.shape, dtype=bool)
        todo = [left.pop()]
        while todo:
            y, x = todo.pop()
            blob[y, x] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo += near
        blobs.append(blob)
    return blobs


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

    Returns shares: "right" pictures, which hold one to three legal shapes and nothing else;
    "copies" of training pictures or their mirror images; "distinct" pictures. And counts in right
    pictures: "kinds", int (4,), in the order of KINDS; "shapes", int (3,): with 1, 2 and 3 shapes.
    """
    pictures = (np.asarray(x)[:, 0] > 0).astype(np.uint8)  # (n, 32, 32)
    known = {picture.tobytes() for picture in training}
    copies, kinds, numbers = 0, np.zeros(len(KINDS), dtype=int), np.zeros(MAX_SHAPES, dtype=int)
    for picture in pictures:
        copies += any(image.tobytes() in known for image in mirror_images(picture))
        found = [kind for kind, _ in explain(picture)]
        if 1 <= len(found) <= MAX_SHAPES and None not in found:
            numbers[len(found) - 1] += 1
            for kind in found:
                kinds[KINDS.index(kind)] += 1
    n, distinct = len(pictures), len({picture.tobytes() for picture in pictures})
    shares = {"right": int(numbers.sum()) / n, "copies": copies / n, "distinct": distinct / n}
    return {**shares, "kinds": kinds, "shapes": numbers}


def coloured(pictures):
    """0/1 pictures (n, 32, 32) -> (n, 32, 32, 3): blobs in COLOURS, red if in no catalogue."""
    images = np.zeros((*pictures.shape, 3), dtype=np.float32)
    for image, picture in zip(images, pictures):
        for kind, blob in explain(picture):
            image[blob] = COLOURS[KINDS.index(kind)] if kind else (1, 0, 0)
    return images


if __name__ == "__main__":
    to_image(tile(coloured(make_dataset(32, seed=0)))).save("shapes.png")
    masks = [mask for kind in KINDS for mask in CATALOGUE[kind]]
    cells = np.zeros((len(masks), SIZE, SIZE))
    for cell, mask in zip(cells, masks):
        cell[: mask.shape[0], : mask.shape[1]] = mask
    to_image(tile(cells, columns=12, scale=2)).save("catalogue.png")
    print(f"saved shapes.png and catalogue.png, {len(masks)} shapes")
