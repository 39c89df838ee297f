"""The data: 32x32 binary pictures with one to three shapes, or your own, for the model as float32
(C, H, W) in [-1, 1]. python shapes.py saves shapes.png: training pictures in colours."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

SIZE = 32  # pixels, height and width of a picture
GRID = 4  # all sizes and places are multiples of this
KINDS = ("circle", "rectangle", "triangle", "line")
COLOURS = ((1, 0.2, -1), (-1, 0.4, 1), (-0.6, 0.6, -0.6), (0.8, 0, 0.8))  # of KINDS, RGB

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


SIDES = (8, 12, 16)
made = [("circle", circle(diameter)) for diameter in SIDES]
made += [("rectangle", np.ones((height, width), bool)) for height in SIDES for width in SIDES]
made += [("triangle", triangle(height, rise)) for height, rise in ((8, 1), (12, 2), (16, 2))]
made += [("line", np.ones((GRID, length), bool)) for length in range(12, SIZE + 1, GRID)]
made += [("line", diagonal(length)) for length in range(8, 25, GRID)]

masks = {kind: {} for kind in KINDS}  # all mirror images, by size and pixels, so each mask once
for kind, mask in made:
    for image in mirror_images(mask):
        masks[kind][image.shape, image.tobytes()] = image
CATALOGUE = {kind: list(masks[kind].values()) for kind in KINDS}
KIND_OF = {key: kind for kind in KINDS for key in masks[kind]}  # key: the size and pixels of a mask

# ==== 2. The data, for the model and for people ===================================================
# - Shapes lie on a grid of 4 pixels, so a blurred or ragged edge is always wrong.
# - No shape is small: 34 pixels at least. A smaller one would come later out of the noise.
# - Shapes keep apart, so that a picture can be read in one way only: an L could be two rectangles.


def draw_picture(kinds, rng):
    """A picture with a shape of each of these kinds: bool (32, 32)."""
    picture, taken = np.zeros((2, SIZE, SIZE), dtype=bool)  # taken: the boxes around the shapes
    for kind in kinds:
        mask = CATALOGUE[kind][rng.integers(len(CATALOGUE[kind]))]
        h, w = mask.shape
        for _ in range(30):  # tries, before the picture begins anew with other masks
            y = GRID * rng.integers((SIZE - h) // GRID + 1)
            x = GRID * rng.integers((SIZE - w) // GRID + 1)
            # The boxes must not even touch, so the slice is one pixel larger on each side.
            if not taken[max(0, y - 1) : y + h + 1, max(0, x - 1) : x + w + 1].any():
                break
        else:
            return draw_picture(kinds, rng)
        picture[y : y + h, x : x + w] = mask
        taken[y : y + h, x : x + w] = True
    return picture


def make_dataset(n, seed):
    """n pictures, float32 (n, 1, 32, 32), background -1 and shape 1. seed: as for default_rng.

    36 % have one shape, 48 % two and 16 % three, each of a kind drawn uniformly. If they do not
    fit, all but the kinds is drawn again, so where there are three, small ones are more frequent.
    """
    rng, x = np.random.default_rng(seed), -torch.ones(n, 1, SIZE, SIZE)
    for picture in x:
        number = 1 + rng.binomial(2, 0.4)
        kinds = [KINDS[k] for k in rng.integers(len(KINDS), size=number)]
        picture[:, draw_picture(kinds, rng)] = 1
    return x


def load_pictures(folder):
    """All .png, .jpg and .jpeg files of a folder, sorted by name: float32 (n, C, H, W) in [-1, 1].

    C is 1 if every pixel is grey, else 3. Transparent pixels become white, as on a page. Raises
    OSError, in one line, if there is none, and for the first that cannot be read, has 16 bits a
    pixel, another size than the one before, or sides that are no multiples of 8.
    """
    pictures, endings = [], (".png", ".jpg", ".jpeg")
    for file in sorted(f for f in Path(folder).iterdir() if f.suffix.lower() in endings):
        try:
            image = Image.open(file)
            layer = image.convert("RGBA")
        except Exception as e:
            raise OSError(f"cannot read {file}: {e}") from e
        page = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer)
        pictures.append(np.asarray(page.convert("RGB")))  # (H, W, 3)
        h, w, _ = shape = pictures[-1].shape
        if h % 8 or w % 8 or shape != pictures[0].shape or image.mode.startswith("I"):
            raise OSError(f"{file} is {w}x{h}, {image.mode}; want one size, in steps of 8, 8 bits")
    if not pictures:
        raise OSError(f"no .png, .jpg or .jpeg in {folder}")
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1  # (n, 3, H, W)
    return x[:, :1].clone() if (x == x[:, :1]).all() else x.contiguous()


def mirror(x):
    """Mirrors each picture left-right with probability 1/2 (Ho, Appendix B)."""
    flip = torch.rand(len(x), 1, 1, 1) < 0.5
    return torch.where(flip, x.flip(3), x)


def tile(x, columns=8, titles=()):
    """Pictures x, grey or colour, clipped to [-1, 1] and enlarged, with titles above the columns,
    as one Pillow image."""
    zoom = max(1, 128 // max(x.shape[2:]))
    x = F.interpolate(x.cpu().clamp(-1, 1), scale_factor=zoom).expand(-1, 3, -1, -1)  # (n, 3, h, w)
    x = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()  # (n, h, w, 3)
    h, w, top, columns = x.shape[1] + 2, x.shape[2] + 2, 24 * bool(titles), min(columns, len(x))
    sheet = Image.new("RGB", (w * columns, top + h * -(-len(x) // columns)), "gray")
    for i, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((i * w + 6, 2), title, "black", font_size=18)
    for i, picture in enumerate(x):
        sheet.paste(Image.fromarray(picture), (i % columns * w + 1, top + i // columns * h + 1))
    return sheet


# ==== 3. Is a picture right? ======================================================================


def explain(picture):
    """Cuts a picture, bool (32, 32), into blobs: the connected sets of shape pixels, also across
    corners. Yields (kind, blob), with None for the kind of a blob that is in no catalogue."""
    shape = torch.from_numpy(picture)[None].float()  # (1, 32, 32)
    label = shape * torch.arange(1, shape.numel() + 1).view(shape.shape)
    while not label.equal(spread := shape * F.max_pool2d(label, 3, stride=1, padding=1)):
        label = spread  # each pixel takes the largest label of itself and its neighbours
    for n in label[label > 0].unique():
        blob = (label[0] == n).numpy()
        rows, columns = blob.any(1).nonzero()[0], blob.any(0).nonzero()[0]
        cut = blob[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        yield KIND_OF.get((cut.shape, cut.tobytes())), blob


def score(x, training):
    """The shares of right ones and of copies among samples x; above 0 is shape. Right: one to three
    legal shapes that do not touch, and nothing else. A copy is equal to one of the training
    pictures, perhaps turned or mirrored."""
    pictures = (x[:, 0] > 0).cpu().numpy()  # (n, 32, 32)
    known = {picture.tobytes() for picture in (training[:, 0] > 0).numpy()}
    found = [[kind for kind, _ in explain(picture)] for picture in pictures]
    right = [1 <= len(kinds) <= 3 and None not in kinds for kinds in found]
    copies = [any(m.tobytes() in known for m in mirror_images(p)) for p in pictures]
    return sum(right) / len(x), sum(copies) / len(x)


def coloured(x):
    """Pictures of shapes in colour, (n, 3, 32, 32): blobs in COLOURS, red if in no catalogue."""
    images = -torch.ones(len(x), 3, SIZE, SIZE)
    for image, picture in zip(images, (x[:, 0] > 0).cpu().numpy()):
        for kind, blob in explain(picture):
            colour = COLOURS[KINDS.index(kind)] if kind else (1, -1, -1)
            image[:, blob] = torch.tensor(colour)[:, None].float()
    return images


if __name__ == "__main__":
    try:
        tile(coloured(make_dataset(32, seed=0))).save("shapes.png")
    except OSError as e:
        sys.exit(f"error: {e}")
