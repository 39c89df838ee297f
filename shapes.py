"""The data: 32x32 binary pictures of one to three shapes, drawn from integers.

Nothing is downloaded. `make_dataset(10_000, seed=0)` draws ten thousand pictures in
well under a second, and the same seed gives the same bytes on every machine, because
every pixel is decided by comparing integers: there is no rounding to disagree about.

    python shapes.py          saves shapes.png, a labelled grid of the data

Why shapes, and not photographs? Because here *right* has a meaning. A generated face can
only be judged by eye; a generated circle either is a circle or it is not.
"""

import argparse
import math
import sys

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D

# ---------------------------------------------------------------------------------------
# 1. What is legal
# ---------------------------------------------------------------------------------------
# A shape is a kind and a few integers. Pixel (x, y) is column x, row y, counted from the
# top left, and every number below is in pixels. The limits keep each shape large enough
# to be recognised, and three of them small enough to fit side by side.

SIZE = 32
KINDS = ("circle", "rectangle", "triangle", "line")
PARAMETERS = {
    "circle": ("cx", "cy", "r"),
    "rectangle": ("x0", "y0", "x1", "y1"),  # two opposite corners, both inside
    "triangle": ("ax", "ay", "bx", "by", "cx", "cy"),
    "line": ("ax", "ay", "bx", "by", "width"),
}
MAX_SHAPES = 3
RADIUS = (4, 8)  # a circle of radius 4 is 9 pixels across
SIDE = (6, 16)  # of a rectangle; its shorter side stays twice as wide as any line
HEIGHT = 7  # least of a triangle's three heights: no slivers
SPAN = 20  # of a triangle's bounding box, at most
LENGTH = (12, 22)  # of a line, end to end
WIDTH = (2, 3)  # of a line
MARGIN = 2  # from a line's end point to the frame, so that its corners stay inside
TRIES = 30  # at placing a shape beside the others, before the picture begins again
# Two shapes of one picture never touch, not even at a corner. Without this rule a picture
# has more than one reading: an L is two overlapping rectangles or one rectangle with
# a corner bitten off, and nobody could say whether a generated L is right or wrong.


def is_legal(kind, params):
    """Says which shapes keep the limits above.

    kind: one of KINDS. params: integers (m, k), k and their order as in PARAMETERS[kind].
    Returns bool (m,).
    """
    p = np.asarray(params, dtype=np.int32).T  # (k, m)
    if kind == "circle":
        cx, cy, r = p
        fits = (r <= cx) & (cx < SIZE - r) & (r <= cy) & (cy < SIZE - r)
        return fits & (RADIUS[0] <= r) & (r <= RADIUS[1])
    if kind == "rectangle":
        x0, y0, x1, y1 = p
        w, h = x1 - x0 + 1, y1 - y0 + 1
        fits = (x0 >= 0) & (x1 < SIZE) & (y0 >= 0) & (y1 < SIZE)
        return fits & (SIDE[0] <= np.minimum(w, h)) & (np.maximum(w, h) <= SIDE[1])
    if kind == "triangle":
        x, y = p[0::2], p[1::2]  # (3, m) each
        fits = ((p >= 0) & (p < SIZE)).all(0)
        fits &= (np.ptp(x, axis=0) < SPAN) & (np.ptp(y, axis=0) < SPAN)
        longest2 = ((x - x[[1, 2, 0]]) ** 2 + (y - y[[1, 2, 0]]) ** 2).max(0)
        area2 = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])
        # The least height stands on the longest side: height = 2 * area / side, squared
        # so that it stays an integer.
        return fits & (area2**2 >= HEIGHT**2 * longest2)
    ax, ay, bx, by, width = p
    ends = p[:4]
    fits = ((ends >= MARGIN) & (ends < SIZE - MARGIN)).all(0)
    length2 = (bx - ax) ** 2 + (by - ay) ** 2
    fits &= (LENGTH[0] ** 2 <= length2) & (length2 <= LENGTH[1] ** 2)
    return fits & (WIDTH[0] <= width) & (width <= WIDTH[1])


# ---------------------------------------------------------------------------------------
# 2. One function per shape
# ---------------------------------------------------------------------------------------
# Each asks of all 1024 pixels at once: is your centre inside? The parameters may be
# integers, giving one (32, 32) mask, or arrays (m,), giving m masks (m, 32, 32).

X = np.arange(SIZE, dtype=np.int16)[None, :]  # (1, 32)
Y = np.arange(SIZE, dtype=np.int16)[:, None]  # (32, 1)


def _per_picture(*params):
    return [np.asarray(p, dtype=np.int16)[..., None, None] for p in params]  # (m, 1, 1)


def circle(cx, cy, r):
    """Masks of filled circles; bool (m, 32, 32), see PARAMETERS for the integers."""
    cx, cy, r = _per_picture(cx, cy, r)
    # r * r + r is (r + 1/2)^2 less a quarter: the circle passes between the pixels
    # instead of just touching four of them, which would look like four pimples.
    return (X - cx) ** 2 + (Y - cy) ** 2 <= r * r + r


def rectangle(x0, y0, x1, y1):
    """Masks of filled upright rectangles; bool (m, 32, 32), corners included."""
    x0, y0, x1, y1 = _per_picture(x0, y0, x1, y1)
    return ((x0 <= X) & (X <= x1)) & ((y0 <= Y) & (Y <= y1))


def triangle(ax, ay, bx, by, cx, cy):
    """Masks of filled triangles; bool (m, 32, 32), all pixels whose square it enters."""
    ax, ay, bx, by, cx, cy = _per_picture(ax, ay, bx, by, cx, cy)
    # Inside means: on the same side of all three edges. A cross product tells the side, and
    # `turn` makes it positive inside for either winding. (|dx| + |dy|) / 2 is what a corner
    # of the pixel's square may add to it: were only centres asked, a sharp tip would end in
    # a loose pixel. The bounding box cuts off what this adds beyond the tips.
    turn = np.sign((bx - ax) * (cy - ay) - (cx - ax) * (by - ay))
    xs, ys = np.stack([ax, bx, cx]), np.stack([ay, by, cy])
    inside = ((xs.min(0) <= X) & (X <= xs.max(0))) & (
        (ys.min(0) <= Y) & (Y <= ys.max(0))
    )
    for px, py, qx, qy in ((ax, ay, bx, by), (bx, by, cx, cy), (cx, cy, ax, ay)):
        dx, dy = turn * (qx - px), turn * (qy - py)
        inside &= 2 * dx * (Y - py) + (np.abs(dx) + np.abs(dy)) > 2 * dy * (X - px)
    return inside


def line(ax, ay, bx, by, width):
    """Masks of straight lines with square ends; bool (m, 32, 32)."""
    ax, ay, bx, by, width = _per_picture(ax, ay, bx, by, np.asarray(width))
    dx, dy = bx - ax, by - ay
    length2 = (dx * dx + dy * dy).astype(np.int32)
    along = dx * (X - ax) + dy * (Y - ay)
    across = (dx * (Y - ay) - dy * (X - ax)).astype(
        np.int32
    )  # length * signed distance
    across *= np.where(
        (dx < 0) | ((dx == 0) & (dy < 0)), -1, 1
    )  # the same from either end
    # |distance| <= width / 2, squared and times 4 so that it stays an integer. One edge is
    # in, the other out: else an upright line of width 2 would cover three columns.
    reach, offset = width * width * length2, 4 * across * np.abs(across)
    return (along >= 0) & (along <= length2) & (-reach < offset) & (offset <= reach)


DRAW = {"circle": circle, "rectangle": rectangle, "triangle": triangle, "line": line}


# ---------------------------------------------------------------------------------------
# 3. A data set
# ---------------------------------------------------------------------------------------


def random_shapes(kind, m, rng):
    """m shapes of one kind, each legal shape equally likely: integers (m, k)."""
    found = np.empty((0, len(PARAMETERS[kind])), dtype=np.int16)
    while len(found) < m:  # draw from the whole frame, keep what is legal
        tries = rng.integers(0, SIZE, (16 * m, found.shape[1]), dtype=np.int16)
        if kind == "circle":
            tries[:, 2] = rng.integers(RADIUS[0], RADIUS[1] + 1, len(tries))
        if kind == "line":
            tries[:, 4] = rng.integers(WIDTH[0], WIDTH[1] + 1, len(tries))
        found = np.concatenate([found, tries[is_legal(kind, tries)]])
    return found[:m]


def draw(kinds, params):
    """The union of each picture's shapes: int (n, 3), int (n, 3, 6) -> bool (n, 32, 32)."""
    pictures = np.zeros((len(kinds), SIZE, SIZE), dtype=bool)
    for k, kind in enumerate(KINDS):
        for slot in range(MAX_SHAPES):
            which = kinds[:, slot] == k
            integers = params[which, slot, : len(PARAMETERS[kind])]
            pictures[which] |= DRAW[kind](*integers.T)
    return pictures


def pack(masks):
    """Each row of 32 pixels as one 32-bit number, bit x for pixel x: (m, 32, 32) -> (m, 32)."""
    return np.packbits(masks, axis=2, bitorder="little").view("<u4")[:, :, 0]


def touches(shape, picture):
    """Says where a shape overlaps or touches, also at a corner, what is drawn already.

    Both as pack makes them, uint32 (m, 32), so that one operation looks at 32 pixels.
    Returns bool (m,).
    """
    wide = (
        picture | picture << 1 | picture >> 1
    )  # (m, 32), and its left and right neighbours
    near = wide.copy()
    near[:, 1:] |= wide[:, :-1]  # and the rows above and below
    near[:, :-1] |= wide[:, 1:]
    return (shape & near).any(1)


def make_scenes(n, seed):
    """Draws n pictures and says what is in them.

    Returns pictures, uint8 (n, 32, 32), background 0 and shape 1; kinds, int (n, 3), an
    index into KINDS or -1 for "no shape"; params, int (n, 3, 6), the integers of each
    shape as in PARAMETERS, the unused ones 0. Number of shapes and kinds are uniform.
    """
    rng = np.random.default_rng(seed)
    count = rng.integers(1, MAX_SHAPES + 1, n)
    kinds = rng.integers(0, len(KINDS), (n, MAX_SHAPES))
    kinds[np.arange(MAX_SHAPES) >= count[:, None]] = -1
    params = np.zeros((n, MAX_SHAPES, 6), dtype=np.int64)
    pictures = np.zeros((n, SIZE), dtype=np.uint32)
    todo = np.arange(n)
    while len(todo):
        pictures[todo] = 0
        stuck = []
        for slot in range(MAX_SHAPES):
            for k, kind in enumerate(KINDS):
                left = todo[kinds[todo, slot] == k]
                for _ in range(TRIES):
                    if len(left) == 0:
                        break
                    shapes = random_shapes(kind, len(left), rng)
                    drawn = pack(DRAW[kind](*shapes.T))  # (m, 32)
                    bad = touches(drawn, pictures[left])
                    pictures[left[~bad]] |= drawn[~bad]
                    params[left[~bad], slot, : shapes.shape[1]] = shapes[~bad]
                    left = left[bad]
                stuck.append(left)
        # No room was left for some shape: those pictures begin again. Their number and
        # kinds of shapes stay as drawn, else small shapes and small numbers would win.
        todo = np.unique(np.concatenate(stuck))
    rows = pictures.astype("<u4").view(np.uint8).reshape(n, SIZE, SIZE // 8)
    return np.unpackbits(rows, axis=2, bitorder="little"), kinds, params


def make_dataset(n, seed):
    """n pictures, uint8 (n, 32, 32), background 0 and shape 1."""
    return make_scenes(n, seed)[0]


# ---------------------------------------------------------------------------------------
# 4. What the model sees, and what people see
# ---------------------------------------------------------------------------------------


def to_model(pictures):
    """0/1 pictures (n, 32, 32) -> float32 (n, 1, 32, 32), background -1 and shape 1.

    The reverse process starts from noise of mean 0 and variance 1, and a network likes its
    input on one scale throughout: so the data is centred on 0 too (Ho et al., Section 3.3).
    """
    return np.asarray(pictures, dtype=np.float32)[:, None] * 2 - 1


def from_model(x):
    """(n, 1, 32, 32), about [-1, 1] -> float32 (n, 32, 32) in [0, 1], cut off there."""
    return np.clip((np.asarray(x, dtype=np.float32)[:, 0] + 1) / 2, 0, 1)


def tile(pictures, columns=8, scale=4):
    """Pictures side by side: (n, 32, 32) in [0, 1] -> one float array (height, width).

    Every pixel becomes scale x scale pixels, grey lines stand between the pictures.
    """
    n = len(pictures)
    rows = math.ceil(n / columns)
    cells = np.ones((rows * columns, SIZE, SIZE), dtype=np.float32)
    cells[:n] = pictures
    cells = cells.repeat(scale, axis=1).repeat(scale, axis=2)
    cells = np.pad(cells, ((0, 0), (1, 1), (1, 1)), constant_values=0.5)
    cells = cells.reshape(
        rows, columns, *cells.shape[1:]
    )  # (rows, columns, side, side)
    return cells.transpose(0, 2, 1, 3).reshape(rows * cells.shape[2], -1)


def save_picture(path, picture):
    """Saves an array (height, width) in [0, 1] as a grey PNG, pixel for pixel."""
    imsave(path, picture, cmap="gray", vmin=0, vmax=1)


def save_labelled_grid(path, n, seed):
    """Saves n pictures of the data with the kinds of their shapes above them."""
    pictures, kinds, _ = make_scenes(n, seed)
    columns = min(n, 8)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(1.3 * columns, 1.6 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, picture, kind in zip(figure.axes, pictures, kinds):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes.set_title("\n".join(KINDS[k] for k in kind if k >= 0), fontsize=7)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------
# 5. The inverse: which shapes is this a picture of?
# ---------------------------------------------------------------------------------------
# Shapes do not touch, so every connected blob of pixels has to be one shape. For each blob
# and each kind we guess the integers from the blob's outline, then move them by single
# pixels as long as fewer pixels differ. What a perfect shape gives the guess is already
# exact for three kinds out of four: the moves are for lines and for blemished pictures.

# A picture is called clean when at most this many of its 1024 pixels differ from the nearest
# legal one: one slip for each of three shapes. A shape of the wrong kind differs by more.
TOLERANCE = 3


def find_blobs(pictures):
    """The three largest connected blobs of each picture, corners connect.

    pictures: bool (n, 32, 32). Returns bool (n, 3, 32, 32), empty where there is none.
    """
    n = len(pictures)
    labels = pictures * np.arange(1, SIZE * SIZE + 1, dtype=np.int16).reshape(
        SIZE, SIZE
    )
    while (
        True
    ):  # every pixel takes the largest label around it, until a blob has just one
        near = np.pad(labels, ((0, 0), (1, 1), (1, 1)))  # (n, 34, 34)
        near = np.maximum(
            np.maximum(near[:, :-2], near[:, 1:-1]), near[:, 2:]
        )  # (n, 32, 34)
        near = (
            np.maximum(np.maximum(near[..., :-2], near[..., 1:-1]), near[..., 2:])
            * pictures
        )
        if np.array_equal(near, labels):
            break
        labels = near
    sizes = np.zeros((n, SIZE * SIZE + 1), dtype=np.int64)
    np.add.at(sizes, (np.arange(n)[:, None], labels.reshape(n, -1)), 1)
    sizes[:, 0] = 0  # the background
    largest = np.argsort(-sizes, axis=1, kind="stable")[:, :MAX_SHAPES]  # (n, 3)
    return (labels[:, None] == largest[:, :, None, None]) & pictures[:, None]


def _guess(kind, blobs):
    """First guess of the integers of a shape of this kind: blobs (m, 32, 32) -> (m, k)."""
    m, rows = len(blobs), np.arange(len(blobs))
    columns, lines = blobs.any(1), blobs.any(2)  # (m, 32)
    x0, x1 = columns.argmax(1), SIZE - 1 - columns[:, ::-1].argmax(1)
    y0, y1 = lines.argmax(1), SIZE - 1 - lines[:, ::-1].argmax(1)
    if kind == "rectangle":
        return np.stack([x0, y0, x1, y1], 1)
    if kind == "circle":
        r = np.clip((x1 - x0 + y1 - y0 + 2) // 4, *RADIUS)
        return np.stack([(x0 + x1) // 2, (y0 + y1) // 2, r], 1)
    flat = blobs.reshape(m, -1)
    px, py = np.tile(np.arange(SIZE), SIZE), np.repeat(np.arange(SIZE), SIZE)  # (1024,)
    area = flat.sum(1)
    mx, my = (flat * px).sum(1) / area, (flat * py).sum(1) / area
    dx, dy = px - mx[:, None], py - my[:, None]  # (m, 1024), from the centre of gravity
    if kind == "triangle":
        # The pixel farthest from a point inside is a vertex; so is the one farthest from
        # that vertex; the third is farthest from the line through these two.
        a = np.where(flat, dx**2 + dy**2, -1).argmax(1)
        dx, dy = px - px[a, None], py - py[a, None]
        b = np.where(flat, dx**2 + dy**2, -1).argmax(1)
        across = dx * dy[rows, b][:, None] - dy * dx[rows, b][:, None]
        c = np.where(flat, np.abs(across), -1).argmax(1)
        return np.stack([px[a], py[a], px[b], py[b], px[c], py[c]], 1)
    # A line runs along the direction in which its pixels spread most.
    xx, yy, xy = (
        (flat * dx * dx).sum(1),
        (flat * dy * dy).sum(1),
        (flat * dx * dy).sum(1),
    )
    angle = 0.5 * np.arctan2(2 * xy, xx - yy)
    ux, uy = np.cos(angle), np.sin(angle)
    along = np.where(flat, dx * ux[:, None] + dy * uy[:, None], 0)
    first, last = along.min(1), along.max(1)
    width = np.clip(np.rint(area / (last - first + 1)), *WIDTH)
    ends = [mx + first * ux, my + first * uy, mx + last * ux, my + last * uy, width]
    return np.rint(np.stack(ends, 1)).astype(np.int64)


def _moves(kind):
    """The one-pixel changes that are tried: of one point, and a radius or width with it."""
    k = len(PARAMETERS[kind])
    moves = np.stack(np.meshgrid(*[(0, -1, 1)] * k), -1).reshape(-1, k)
    points = moves[:, : k // 2 * 2].reshape(len(moves), -1, 2)
    return moves[(points != 0).any(2).sum(1) <= 1]


def _fit(kind, blobs):
    """The nearest shape of one kind: its integers (m, k) and the pixels that differ (m,)."""

    def differ(params, which):
        wrong = (DRAW[kind](*params.T) ^ blobs[which]).sum((1, 2))
        return wrong + SIZE * SIZE * ~is_legal(kind, params)

    params = _guess(kind, blobs)
    best = differ(params, slice(None))
    moves = _moves(kind)
    todo = np.nonzero(best > 0)[0]
    while len(todo):
        costs = np.stack(
            [differ(params[todo] + move, todo) for move in moves]
        )  # (moves, m)
        pick, cost = costs.argmin(0), costs.min(0)
        better = cost < best[todo]
        todo = todo[better]
        params[todo] += moves[pick[better]]
        best[todo] = cost[better]
        todo = todo[best[todo] > 0]
    return params, best


def explain_all(pictures):
    """Finds in each picture the legal shapes that draw it, or come nearest.

    pictures: bool or 0/1, (n, 32, 32). Returns kinds, int (n, 3), and params, int
    (n, 3, 6), as make_scenes does, and int (n,): how many pixels differ.
    """
    pictures = np.asarray(pictures).astype(bool)
    n = len(pictures)
    kinds = np.full((n, MAX_SHAPES), -1)
    params = np.zeros((n, MAX_SHAPES, 6), dtype=np.int64)
    blobs = find_blobs(pictures)  # (n, 3, 32, 32)
    sizes = blobs.sum((2, 3))
    where = np.nonzero(sizes)
    blobs, best = blobs[where], sizes[where]  # leaving a blob out costs all its pixels
    found, numbers = np.full(len(best), -1), np.zeros((len(best), 6), dtype=np.int64)
    for k, kind in enumerate(KINDS):
        todo = np.nonzero(best > 0)[0]
        if len(todo) == 0:
            break
        p, cost = _fit(kind, blobs[todo])
        better = cost < best[todo]
        todo = todo[better]
        best[todo], found[todo] = cost[better], k
        numbers[todo] = 0
        numbers[todo, : p.shape[1]] = p[better]
    kinds[where], params[where] = found, numbers
    return kinds, params, (draw(kinds, params) ^ pictures).sum((1, 2))


def explain(picture):
    """One picture, 0/1 (32, 32): ([(kind, integers), ...], number of pixels that differ)."""
    picture = np.asarray(picture)
    if picture.shape != (SIZE, SIZE) or not np.isin(picture, (0, 1)).all():
        raise ValueError(
            f"expected a picture of 0 and 1, ({SIZE}, {SIZE}); got {picture.shape}"
        )
    kinds, params, differ = explain_all(picture[None])
    found = [
        (KINDS[k], tuple(p[: len(PARAMETERS[KINDS[k]])].tolist()))
        for k, p in zip(kinds[0], params[0])
        if k >= 0
    ]
    return found, int(differ[0])


def is_clean(kinds, differ):
    """Which pictures are clean, from what explain_all says of them: bool (n,)."""
    return (kinds >= 0).any(1) & (differ <= TOLERANCE)


# ---------------------------------------------------------------------------------------
# 6. The score: is it learning?
# ---------------------------------------------------------------------------------------


def score(x, training=None):
    """What a batch of generated pictures is like, in numbers.

    x: float (n, 1, 32, 32) in [-1, 1]. training: uint8 (m, 32, 32), the pictures that were
    trained on. Returns a dictionary: "clean", share of clean pictures; "decided", share of
    pixels within 0.1 of -1 or +1; "kinds", int (4,), circles, rectangles, triangles and
    lines found in clean pictures; "shapes", int (3,), clean pictures with 1, 2, 3 shapes;
    "copies", share of pictures that are in training, pixel for pixel; "distinct", share of
    different pictures. Raises ValueError for another shape, other values or none.
    """
    x = np.asarray(x, dtype=np.float32)
    if x.ndim != 4 or x.shape[1:] != (1, SIZE, SIZE) or len(x) == 0:
        raise ValueError(f"expected pictures (n, 1, {SIZE}, {SIZE}), got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("expected finite values, got nan or infinity")
    if np.abs(x).max() > 1:
        raise ValueError(
            f"expected values in [-1, 1], got up to {np.abs(x).max():.3g}; clip first"
        )
    pictures = (x[:, 0] > 0).astype(np.uint8)  # (n, 32, 32)
    kinds, _, differ = explain_all(pictures)
    clean = is_clean(kinds, differ)
    known = {
        p.tobytes() for p in np.asarray([] if training is None else training, np.uint8)
    }
    seen = [p.tobytes() for p in pictures]
    return {
        "clean": clean.mean(),
        "decided": (np.abs(np.abs(x) - 1) < 0.1).mean(),
        "kinds": np.bincount(kinds[clean].ravel() + 1, minlength=5)[1:],
        "shapes": np.bincount((kinds[clean] >= 0).sum(1), minlength=4)[1:],
        "copies": np.mean([p in known for p in seen]),
        "distinct": len(set(seen)) / len(seen),
    }


def score_table(rows):
    """A dictionary {name: score(...)} as text, one line each; kinds and shapes in percent."""

    def percent(counts):
        return " ".join(f"{100 * c / max(1, counts.sum()):3.0f}" for c in counts)

    shares = f"{'clean':>8}{'decided':>9}{'copies':>8}{'distinct':>10}"
    lines = [f"{'':<24}{shares}   {'1 2 3 shapes':<13}  circ rect tri line"]
    for name, s in rows.items():
        shares = f"{s['clean']:>8.1%}{s['decided']:>9.1%}{s['copies']:>8.1%}{s['distinct']:>10.1%}"
        lines.append(
            f"{name:<24}{shares}   {percent(s['shapes']):<13}  {percent(s['kinds'])}"
        )
    return "\n".join(lines)


COLOURS = {
    "circle": "orange",
    "rectangle": "deepskyblue",
    "triangle": "limegreen",
    "line": "violet",
}


def save_explained(path, x):
    """Saves pictures with the shapes found in them outlined, malformed ones framed in red.

    x: float (n, 1, 32, 32), about [-1, 1].
    """
    pictures = from_model(x)
    kinds, params, differ = explain_all(pictures > 0.5)
    clean = is_clean(kinds, differ)
    columns = min(len(x), 8)
    rows = math.ceil(len(x) / columns)
    figure = Figure(figsize=(1.4 * columns, 1.6 * rows + 0.3), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_visible(False)
    for i, axes in enumerate(figure.axes[: len(x)]):
        axes.set(visible=True, xticks=[], yticks=[])
        axes.imshow(pictures[i], cmap="gray", vmin=0, vmax=1)
        for k, p in zip(kinds[i], params[i]):
            if k >= 0:
                mask = DRAW[KINDS[k]](*p[: len(PARAMETERS[KINDS[k]])])
                # Drawn finer, so that the outline follows the edges of the pixels.
                corner = (-0.5, SIZE - 0.5, -0.5, SIZE - 0.5)
                fine = mask.repeat(8, axis=0).repeat(8, axis=1)
                axes.contour(
                    fine, [0.5], colors=COLOURS[KINDS[k]], extent=corner, linewidths=1.2
                )
        if not clean[i]:
            found = (kinds[i] >= 0).any()
            words = f"malformed: {differ[i]} px" if found else "malformed: no shape"
            axes.set_title(words, fontsize=8, color="red")
            for spine in axes.spines.values():
                spine.set(color="red", linewidth=2)
    handles = [Line2D([], [], color=c, label=k) for k, c in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------------------------------
# 7. The command line
# ---------------------------------------------------------------------------------------


def fail(message):
    """Ends the program with one line and exit code 1."""
    sys.exit(f"error: {message}")


def number(kind, low, high):
    """An argparse type: a number of this kind between low and high, both included."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also true for nan
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {name} from {low} to {high}"
            )
        return value

    return parse


def main():
    parser = argparse.ArgumentParser(
        description="Save a labelled grid of the data as a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", default="shapes.png", metavar="PATH", help="the picture"
    )
    parser.add_argument(
        "--n", type=number(int, 1, 256), default=32, help="how many pictures"
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the data"
    )
    args = parser.parse_args()
    if not args.output.lower().endswith(".png"):
        fail(f"--output {args.output} should end in .png")
    try:
        save_labelled_grid(args.output, args.n, args.seed)
    except OSError as e:
        fail(f"{e.strerror or e}: {args.output}; make room or choose another --output")
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
