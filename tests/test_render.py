"""Pictures of masks: what is drawn is the mask, whatever it is drawn with, and nothing is left out in silence."""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnreg import BridgeError, InvalidInputError, InvalidMaskError, masks
from attnreg.masks.dense import dense
from attnreg.masks.picture import Picture, render
from attnreg.masks.picture.drawing import COLOURS, Layout

PAGE = Path(__file__).parents[1] / "docs" / "masks.md"
PICTURES = PAGE.parent / "pictures"
UPDATE = "UPDATE_PICTURES"
"""Set to anything, `UPDATE_PICTURES=1 pytest tests/test_render.py` writes the pictures of the page anew."""

IDS = torch.tensor([0, 0, 1, 1, 1, 2])
ISLANDS = torch.tensor([-1, 0, 0, -1, 1, 1])
REAL = torch.tensor([[0, 0, 1, 1, 1, 1]])

GOLDEN = {
    "causal": (masks.causal(), ["■·····", "■■····", "■■■···", "■■■■··", "■■■■■·", "■■■■■■"]),
    "bidirectional": (masks.bidirectional(), ["■■■■■■"] * 6),
    "sliding_window": (masks.sliding_window(2), ["■■····", "■■■···", "·■■■··", "··■■■·", "···■■■", "····■■"]),
    "window": (masks.window(2, 1), ["■■····", "■■■···", "■■■■··", "·■■■■·", "··■■■■", "···■■■"]),
    "chunked": (masks.chunked(4), ["■■■■··", "■■■■··", "■■■■··", "■■■■··", "····■■", "····■■"]),
    "documents": (masks.documents(IDS), ["■■····", "■■····", "··■■■·", "··■■■·", "··■■■·", "·····■"]),
    "blocks": (masks.blocks(ISLANDS), ["······∅", "·■■···", "·■■···", "······∅", "····■■", "····■■"]),
    "padding": (masks.padding(REAL), ["··■■■■"] * 6),
    "prefix": (masks.prefix(2), ["■■····"] * 6),
    "causal & window": (
        masks.causal() & masks.sliding_window(3),
        ["■·····", "■■····", "■■■···", "·■■■··", "··■■■·", "···■■■"],
    ),
    "causal & padding": (
        masks.causal() & masks.padding(REAL),
        ["······∅", "······∅", "··■···", "··■■··", "··■■■·", "··■■■■"],
    ),
    "packed": (
        masks.documents(IDS) & masks.causal(),
        ["■·····", "■■····", "··■···", "··■■··", "··■■■·", "·····■"],
    ),
    "prefix language model": (
        masks.causal() | masks.prefix(3),
        ["■■■···", "■■■···", "■■■···", "■■■■··", "■■■■■·", "■■■■■■"],
    ),
    "image islands": (
        masks.causal() | masks.blocks(ISLANDS),
        ["■·····", "■■■···", "■■■···", "■■■■··", "■■■■■■", "■■■■■■"],
    ),
    "chunked with left padding": (
        masks.causal() & masks.chunked(2, torch.tensor([2])) & masks.padding(REAL),
        ["······∅", "······∅", "··■···", "··■■··", "····■·", "····■■"],
    ),
    "opaque": (lambda b, h, q, k: k == 5 - q, ["·····■", "····■·", "···■··", "··■···", "·■····", "■·····"]),
    "not": (~masks.causal(), ["·■■■■■", "··■■■■", "···■■■", "····■■", "·····■", "······∅"]),
}


def parsed(svg: str) -> ET.Element:
    """Parse a picture of ours."""
    return ET.fromstring(svg)  # noqa: S314 - our own


def cells_of_text(text: str) -> list[str]:
    """Take the rows of cells out of a text, without their labels and the spaces."""
    return ["".join(line.split()[1:]) for line in text.splitlines() if re.match(r" *\d+ [■▒·]", line)]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name) -> None:
    """Each built-in predicate, and the usual combinations, look as they should."""
    function, rows = GOLDEN[name]
    assert cells_of_text(str(render(function, 6))) == rows


def test_whole_text() -> None:
    """Title, positions, legend, density, rows without keys, and the other batch rows are all said."""
    real = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]])
    picture = render(masks.causal(), 3, 4, attention_mask=real, batch=1, title="three new tokens")
    assert str(picture) == repr(picture)
    assert str(picture).splitlines() == [
        "three new tokens",
        "q\\k 0 1 2 3",
        "  1 · · · · ∅",
        "  2 · · ■ ·",
        "  3 · · ■ ■",
        "■ visible  · hidden  ∅ sees no key",
        "3 queries, 4 keys, 25 % visible",
        "1 query sees no key: output 0",
        "batch row 1 of 3; different: 0",
    ]
    assert (picture.density, picture.blind) == (0.25, 1)


def test_tokens() -> None:
    """Tokens stand in place of numbers; what would break a line is spelled out, and what is long is cut visibly."""
    picture = render(masks.causal(), 2, 4, tokens=["a", "<s>", "\n", "x" * 20])
    lines = str(picture).splitlines()
    assert lines[-4:] == ["              \\n ■ ■ ■ ·", "xxxxxxxxxxxxxxx… ■ ■ ■ ■", *lines[-2:]]
    assert [line[17:] for line in lines[-8:-4]] == ["      x", "  <   x", "  s \\ x", "a > n …"]
    drawn = [text.text for text in parsed(picture.svg()).findall(".//{*}text")]
    assert {"a", "<s>", "\\n", "xxxxxxxxxxxxxxx…"} < set(drawn)


def painted(svg: str, picture: Picture) -> list[bytes]:
    """Read the states back from an SVG: the colour that was painted last over the middle of each cell."""
    layout, states = Layout.of(picture), {colour: state for state, colour in COLOURS.items()}
    boxes = [{**each.attrib} for each in parsed(svg).findall(".//{*}rect") if each.get("fill") in states]
    rows = []
    for row in range(len(picture.grid.rows)):
        y = layout.top + (row + 0.5) * layout.cell
        across = [b for b in boxes if float(b["y"]) <= y < float(b["y"]) + float(b["height"])]
        found = []
        for column in range(len(picture.grid.rows[0])):
            x = layout.left + (column + 0.5) * layout.cell
            over = [b for b in across if float(b["x"]) <= x < float(b["x"]) + float(b["width"])]
            found.append(states[over[-1]["fill"]])
        rows.append(bytes(found))
    return rows


def pixels(png: bytes, picture: Picture) -> list[bytes]:
    """Read the states back from a PNG: the colour of the pixel in the middle of each cell."""
    from PIL import Image

    image, layout = Image.open(io.BytesIO(png)), Layout.of(picture)
    states = {tuple(bytes.fromhex(colour[1:])): state for state, colour in COLOURS.items()}
    middles = [
        [2 * (start + (i + 0.5) * layout.cell) for i in range(n)]
        for start, n in ((layout.top, len(picture.grid.rows)), (layout.left, len(picture.grid.rows[0])))
    ]
    return [bytes(states[image.getpixel((int(x), int(y)))] for x in middles[1]) for y in middles[0]]


@st.composite
def masks_of_any_size(draw) -> torch.Tensor:
    """Make boolean masks, some of them with long runs."""
    shape = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.02, 0.5, 0.98]))
    return mask & (torch.arange(shape[0])[:, None] % draw(st.integers(1, 9)) > 0) if draw(st.booleans()) else mask


def condensed(mask: torch.Tensor, cell: tuple[int, int]) -> list[bytes]:
    """Condense by definition: cell by cell."""
    rows, columns = (range(0, size, step) for size, step in zip(mask.shape, cell, strict=True))
    parts = [[mask[q : q + cell[0], k : k + cell[1]] for k in columns] for q in rows]
    return [bytes(int(part.any()) + int(part.all()) for part in row) for row in parts]


@settings(max_examples=40, deadline=None)
@given(masks_of_any_size(), st.sampled_from([None, 1, 3, 8, 100]))
def test_svg_and_cells_are_the_mask(mask, cell) -> None:
    """Whatever the size of a cell: cells, density, rows without keys and the SVG are those of the mask."""
    picture = render(mask, cell=cell)
    assert cell is None or picture.grid.cell == (cell, cell)
    assert max(len(picture.grid.rows), len(picture.grid.rows[0])) <= 64 or cell == 1
    assert list(picture.grid.rows) == condensed(mask, picture.grid.cell)
    assert picture.density == int(mask.sum()) / mask.numel()
    assert picture.blind == int((~mask.any(1)).sum())
    svg = picture.svg()
    assert painted(svg, picture) == list(picture.grid.rows)
    assert svg.count("<rect") < 200 + sum(map(len, picture.grid.rows))


@settings(max_examples=40, deadline=None)
@given(masks_of_any_size())
def test_text_is_the_mask(mask) -> None:
    """Text has at most 32 cells a side, condensed like those of the mask; `most` allows more."""
    picture = render(mask, cell=1)
    merged = picture.grid.merged(32)
    assert max(len(merged.rows), len(merged.rows[0])) <= 32
    glyphs = {"·": 0, "▒": 1, "■": 2}
    for text, cell in ((str(picture), merged.cell), (picture.text(100), (1, 1))):
        rows = [bytes(glyphs[glyph] for glyph in row.removesuffix("∅")) for row in cells_of_text(text)]
        assert rows == condensed(mask, cell)
    assert sum(merged.blind) == picture.blind


@pytest.mark.parametrize("size", [1, 7, 50, 64, 200])
def test_png_is_the_mask(size) -> None:
    """The pixel in the middle of each cell has the colour of its state."""
    pytest.importorskip("PIL", reason="Pillow is not installed: pip install 'attnreg[render]'")
    generator = torch.Generator().manual_seed(size)
    picture = render(torch.rand(size, size + 3, generator=generator) < 0.6)
    png = picture.png()
    assert pixels(png, picture) == list(picture.grid.rows)
    layout = Layout.of(picture)
    assert f'viewBox="0 0 {layout.width} {layout.height}"' in picture.svg()


def test_png_with_title_and_tokens() -> None:
    """A PNG has room for everything that its picture has."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'attnreg[render]'")
    picture = render(masks.padding(REAL), 6, tokens=["Ġ", "…", "", "\n", "</s>", "x" * 30], title="a & b")
    layout = Layout.of(picture)
    assert image.open(io.BytesIO(picture.png())).size == (2 * layout.width, 2 * layout.height)


@pytest.mark.parametrize(("q_length", "kv_length", "offsets"), [(5, 9, (4, 0)), (1, 9, (8, 0)), (3, 4, (7, 6))])
def test_bottom_right_by_default(q_length, kv_length, offsets) -> None:
    """The last query is at the last key's position, and the labels are positions."""
    q_offset, kv_offset = offsets
    picture = render(masks.causal(), q_length, kv_length, kv_offset=kv_offset)
    assert picture == render(masks.causal(), q_length, kv_length, q_offset=q_offset, kv_offset=kv_offset)
    mask = dense(masks.causal(), 1, q_length, kv_length, q_offset, kv_offset)[0, 0]
    assert list(picture.grid.rows) == condensed(mask, (1, 1))
    labels = [int(line.split()[0]) for line in str(picture).splitlines()[1 : q_length + 1]]
    assert labels == list(range(q_offset, q_offset + q_length))
    assert str(picture).split()[1] == str(kv_offset)


def test_large_masks_are_evaluated_in_slices() -> None:
    """8192 by 8192 positions are never asked for at once, and the picture is what it should be."""
    asked = []

    def causal(b, h, q, k):
        asked.append(torch.broadcast_shapes(q.shape, k.shape).numel())
        return k <= q

    picture = render(causal, 8192, elementwise=True)
    assert max(asked) <= 2**20
    assert picture.grid.cell == (128, 128)
    assert picture.grid.rows == tuple(bytes([2] * row + [1] + [0] * (63 - row)) for row in range(64))
    assert picture.grid.visible == 8192 * 8193 // 2
    assert "a cell is 256 queries by 256 keys" in str(picture)
    assert "a cell is 128 queries by 128 keys" in picture.svg()


def test_formatted_masks() -> None:
    """Boolean, additive and block masks show what the mask function shows from which they are made."""
    from torch.nn.attention.flex_attention import create_block_mask

    function = masks.causal() & masks.sliding_window(3)
    picture = render(function, 5)
    boolean = masks.sdpa_mask(1, 5, 5, 0, 0, function)
    assert render(boolean) == render(boolean[0, 0]) == picture
    assert render(masks.eager_mask(1, 5, 5, 0, 0, function)) == picture
    infinite = torch.zeros(5, 5).masked_fill(~boolean[0, 0], float("-inf"))
    assert render(infinite) == picture
    block_mask = create_block_mask(masks.causal() & masks.sliding_window(200), None, None, 500, 500, device="cpu")
    assert str(render(block_mask)).splitlines() == [
        "q\\k 0   256",
        "  0 ▒ · · ·",
        "128 ▒ ▒ · ·",
        "256 ▒ ▒ ▒ ·",
        "384 · ▒ ▒ ▒",
        "■ full  ▒ partial  · empty",
        "500 queries, 500 keys",
        "a cell is 128 queries by 128 keys",
        "blocks of 128 by 128: 0 full, 9 partial, 7 empty",
    ]
    full = create_block_mask(masks.documents(torch.arange(512) // 256), None, None, 512, 512, device="cpu")
    assert render(full).grid.rows == (b"\2\2\0\0", b"\2\2\0\0", b"\0\0\2\2", b"\0\0\2\2")
    assert render(full).density is None
    nothing = create_block_mask(lambda b, h, q, k: (q < 128) & (b == 0), 2, None, 200, 200, device="cpu")
    assert (render(nothing).blind, render(nothing, batch=1).blind) == (72, 200)
    assert render(nothing[0]).grid.rows == render(nothing).grid.rows
    assert "batch row 0 of 2; different: 1" in str(render(nothing))
    assert "at least 72 queries see no key: output 0" in str(render(nothing))
    assert "∅ has queries that see no key" in str(render(nothing))
    long = render(create_block_mask(masks.causal(), None, None, 12800, 12800, device="cpu"))
    assert (len(long.grid.rows), long.grid.cell) == (50, (256, 256))
    assert long.grid.rows[1][:3] == b"\2\1\0"
    assert "blocks of 128 by 128: 4950 full, 100 partial, 4950 empty" in long.caption


def test_others_that_differ_are_named() -> None:
    """Batch rows and heads that are not shown are counted, and named if they differ."""

    def per_head(b, h, q, k):
        return k <= q - h

    assert "head 1 of 3; different: 0, 2" in str(render(per_head, 4, num_heads=3, head=1))
    assert "batch row 0 of 2; the others are equal" in str(render(masks.causal(), 4, batch_size=2))
    many = masks.prefix(torch.arange(20))
    assert "different: 1, 2, 3, 4, 5, 6, 7, 8, … (19 in all)" in str(render(many, 4, batch_size=20))
    biased = torch.zeros(2, 1, 3, 3)
    biased[1, 0, 2, 1] = -1.5
    assert render(biased, batch=1).caption[1:] == (
        "1 visible position has a bias; smallest -1.5, largest -1.5",
        "batch row 1 of 2; different: 0",
    )


@pytest.mark.parametrize(
    ("visible", "text"), [(0, "0 %"), (1, "< 0.1 %"), (3333, "33.3 %"), (9999, "> 99.9 %"), (10000, "100 %")]
)
def test_density_is_never_rounded_to_nothing(visible, text) -> None:
    """A mask with one visible position is not at 0 %, and one with a hidden one is not at 100 %."""
    mask = (torch.arange(10000) < visible).reshape(100, 100)
    assert render(mask).caption[0] == f"100 queries, 100 keys, {text} visible"


def test_save(tmp_path) -> None:
    """The suffix decides; any other is refused, with those that are known."""
    picture = render(masks.causal(), 4, title='a < b & "c"\x00')
    assert picture.save(tmp_path / "mask.svg").read_text("utf-8") == picture.svg() == picture._repr_svg_()
    assert picture.save(str(tmp_path / "mask.TXT")).read_text("utf-8") == f"{picture}\n"
    assert parsed(picture.svg()).find("{*}title").text == 'a < b & "c"\\x00'
    assert parsed(picture.svg()).find("{*}desc").text == "4 queries, 4 keys, 62.5 % visible"
    with pytest.raises(InvalidInputError) as caught:
        picture.save(tmp_path / "mask.jpeg")
    assert str(caught.value) == (
        "the file of a picture is 'mask.jpeg'; wanted: a name that ends in .svg, .png or .txt."
    )
    assert pickle.loads(pickle.dumps(picture)) == picture  # noqa: S301 - our own


def test_without_pillow(monkeypatch, tmp_path) -> None:
    """A missing Pillow is named, with the command that installs it, and no file is left behind."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BridgeError, match=r"Pillow: .* pip install 'attnreg\[render\]', or save the picture as \.svg"):
        render(masks.causal(), 4).save(tmp_path / "mask.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: render([[True]]),
            InvalidMaskError,
            "the mask to render is a list; wanted: a mask function, a bool or floating tensor, or torch's BlockMask.",
        ),
        (
            lambda: render(torch.ones(2, 3, dtype=torch.long)),
            InvalidMaskError,
            "the mask to render is of dtype torch.int64 and shape (2, 3); wanted: a bool or floating tensor (batch, "
            "heads, queries, keys) or (queries, keys); a padding mask (batch, length) is attention_mask=…, or "
            "masks.padding(…).",
        ),
        (
            lambda: render(torch.full((2, 2), float("nan"))),
            InvalidMaskError,
            "the mask to render is NaN at some positions; wanted: 0 to attend, -inf to hide, or a bias.",
        ),
        (
            lambda: render(torch.ones(3, 3).bool(), 3),
            InvalidInputError,
            "q_length is given beside a formatted mask; wanted: None: that mask has its own.",
        ),
        (lambda: render(masks.causal()), InvalidInputError, "q_length is None; wanted: an integer, 1 or more."),
        (lambda: render(masks.causal(), 0), InvalidInputError, "q_length is 0; wanted: an integer, 1 or more."),
        (
            lambda: render(masks.causal(), 4, 2),
            InvalidInputError,
            "q_offset is not given, with 4 queries and keys up to position 1; wanted: the position of the first query.",
        ),
        (lambda: render(masks.causal(), 4, cell=0), InvalidInputError, "cell is 0; wanted: an integer, 1 or more."),
        (
            lambda: render(masks.causal(), 4, batch=1),
            InvalidInputError,
            "batch is 1; wanted: an integer from 0 to 0.",
        ),
        (
            lambda: render(masks.causal(), 4, num_heads=2, head=-1),
            InvalidInputError,
            "head is -1; wanted: an integer from 0 to 1.",
        ),
        (
            lambda: render(masks.causal(), 4, tokens=["a"]),
            InvalidInputError,
            "tokens is 1 long; wanted: a text for each of the 4 positions.",
        ),
        (
            lambda: render(masks.causal(), 99, tokens="x" * 99),
            InvalidInputError,
            "tokens is given for cells of 2 by 2 positions; wanted: cell=1, or at most 64 positions.",
        ),
        (
            lambda: render(masks.causal(), 9, attention_mask=REAL),
            InvalidMaskError,
            "the padding mask is of shape (1, 6); wanted: (1, 9): a row for each of the batch, and every position.",
        ),
        (
            lambda: render(lambda b, h, q, k: k <= q + h, 4),
            InvalidMaskError,
            "the number of heads is not known to a mask function that depends on the head; wanted: num_heads=…, or a "
            "config with num_attention_heads, so that no head is lost.",
        ),
    ],
)
def test_bad_input(make, error, text) -> None:
    """What cannot be drawn is refused, with what it is and what is wanted."""
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == text


def drawn_on_the_page() -> dict[str, str]:
    """Run the page's code, and return the SVG of each picture that the page shows, by name."""
    page = PAGE.read_text("utf-8")
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        if not block.startswith(">>>"):
            exec(block, namespace)  # noqa: S102 - our own page
    names = re.findall(r"\]\(pictures/(\w+)\.svg\)", page)
    return {name: namespace[name].svg() for name in names}


def test_pictures_of_the_page() -> None:
    """Each drawing in docs/masks.md is what the code above it draws now, and there is none besides but of benchmarks."""
    drawn = drawn_on_the_page()
    if UPDATE in os.environ:
        PICTURES.mkdir(exist_ok=True)
        for name, svg in drawn.items():
            (PICTURES / f"{name}.svg").write_text(svg, "utf-8")
    assert {path.stem for path in PICTURES.glob("*.svg") if not path.stem.startswith("bench-")} == set(drawn)
    for name, svg in drawn.items():
        assert (PICTURES / f"{name}.svg").read_text("utf-8") == svg, f"{name}: run with {UPDATE}=1"
