"""Train a small diffusion transformer that draws the digit a caption spells, with attention through the layout router.

Text and image are one sequence to attention, as in Flux and Qwen-Image, and layouts stay as the projections leave
them: `attnreg.attention_forward` takes `b s (n d)`. The model names no backend; `attnreg.use` around it does. Needs the
extra `render` for drawing digits: pip install 'attnreg[render]'. Run it with `python examples/diffusion_transformer.py
--picture digits.png` (a few minutes on two CPU cores), or with `--steps 300` for a first impression.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import attnreg

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE, PATCH, WIDTH, HEADS = 16, 4, 128, 4
SETTINGS = {"steps": 1500, "layers": 3, "batch": 64, "images": 200}


def digits(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw *count* digits of random size, place and angle: images `(count, 16, 16)` of -1 to 1, and which they are."""
    labels = torch.arange(count) % 10
    images = []
    for label, (size, angle, x, y) in zip(labels.tolist(), torch.rand(count, 4).tolist(), strict=True):
        image = Image.new("L", (SIDE, SIDE))
        place = SIDE / 2 - 1 + 2 * x, SIDE / 2 - 1 + 2 * y
        font = ImageFont.load_default(13 + 4 * size)
        ImageDraw.Draw(image).text(place, str(label), fill=255, font=font, anchor="mm")
        turned = image.rotate(20 * angle - 10, Image.Resampling.BICUBIC)
        images.append(torch.frombuffer(bytearray(turned.tobytes()), dtype=torch.uint8))
    return torch.stack(images).view(-1, SIDE, SIDE) / 127.5 - 1, labels


def captions(labels: torch.Tensor, length: int = 5) -> torch.Tensor:
    """Spell *labels* as letters, `(batch, length)`, 0 behind the end of a word."""
    table = [[ord(letter) - ord("a") + 1 for letter in word] + [0] * (length - len(word)) for word in WORDS]
    return torch.tensor(table)[labels]


class Stream(nn.Module):
    """What text or image has of its own in a block: everything but attention."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        nn.init.zeros_(self.modulation.weight)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)

    def before(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return query, key and value, `(3, batch, length, heads * head_dim)`."""
        scale, shift = self.modulation(condition)[:, None].chunk(6, dim=-1)[:2]
        fused: torch.Tensor = self.qkv(self.norm(hidden) * (1 + scale) + shift)
        return torch.stack(fused.chunk(3, dim=-1))

    def after(self, hidden: torch.Tensor, attended: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return `(batch, length, width)`, as *hidden* is."""
        gate, scale, shift, mlp_gate = self.modulation(condition)[:, None].chunk(6, dim=-1)[2:]
        hidden = hidden + gate * self.out(attended)
        fed: torch.Tensor = mlp_gate * self.mlp(self.norm(hidden) * (1 + scale) + shift)
        return hidden + fed


class JointBlock(nn.Module):
    """Two streams that meet in one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = Stream(), Stream()

    def forward(
        self, text: torch.Tensor, image: torch.Tensor, condition: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both streams, `(batch, length, width)` each; *mask* is `(batch, 1, 1, length of both)`."""
        parts = [self.text.before(text, condition), self.image.before(image, condition)]
        query, key, value = torch.cat(parts, dim=2)
        layout, letters = "b s (n d)", text.shape[1]
        both = attnreg.attention_forward(
            query, key, value, layout, layout, layout, layout, dims={"n": HEADS}, attn_mask=mask
        )
        return self.text.after(text, both[:, :letters], condition), self.image.after(
            image, both[:, letters:], condition
        )


class DiffusionTransformer(nn.Module):
    """Predicts the velocity from noise, at time 0, to an image, at time 1."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.letters, self.patches = nn.Embedding(27, WIDTH), nn.Linear(PATCH**2, WIDTH)
        self.places = nn.Parameter(torch.randn(8 + (SIDE // PATCH) ** 2, WIDTH) * 0.02)
        self.condition = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.blocks = nn.ModuleList(JointBlock() for _ in range(layers))
        self.velocity = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PATCH**2))

    def forward(self, pictures: torch.Tensor, time: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
        """Return velocities of *pictures*, `(batch, 16, 16)`, at *time*, `(batch,)`, for `(batch, up to 8)` letters."""
        image = rearrange(pictures, "b (y p) (x q) -> b (y x) (p q)", p=PATCH, q=PATCH)
        image, real = self.patches(image) + self.places[8:], caption > 0
        text = self.letters(caption) + self.places[: caption.shape[1]]
        angles = time[:, None] * torch.logspace(0, 2.5, WIDTH // 2)
        said = (text * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        condition = self.condition(torch.cat([angles.sin(), angles.cos(), said], dim=1))
        mask = nn.functional.pad(real, (0, image.shape[1]), value=True)[:, None, None]
        for block in self.blocks:
            text, image = block(text, image, condition, mask)
        velocity: torch.Tensor = self.velocity(image)
        return rearrange(velocity, "b (y x) (p q) -> b (y p) (x q)", y=SIDE // PATCH, p=PATCH)


def train(model: nn.Module, steps: int, batch: int) -> list[float]:
    """Fit velocities on straight lines from noise to images; return the loss of each step."""
    images, labels = digits(5000)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    warmup = max(0.05, min(1.5 / steps, 0.7))  # more than one step, or OneCycleLR may divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=warmup, cycle_momentum=False)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,))
        noise, time = torch.randn(batch, SIDE, SIDE), torch.randn(batch).sigmoid()
        between = torch.lerp(noise, images[chosen], time[:, None, None])
        found = model(between, time, captions(labels[chosen]))
        loss = nn.functional.mse_loss(found, images[chosen] - noise)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def draw(model: nn.Module, noise: torch.Tensor, caption: torch.Tensor, steps: int = 30) -> torch.Tensor:
    """Follow the velocities from *noise*, `(batch, 16, 16)`, to images."""
    for step in range(steps):
        noise = noise + model(noise, torch.full(noise.shape[:1], step / steps), caption) / steps
    return noise


def right(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of *images* whose nearest neighbour among freshly drawn digits is of their label."""
    known, their = digits(3000)
    nearest = torch.cdist(images.flatten(1), known.flatten(1)).argmin(1)
    return (their[nearest] == labels).float().mean().item()


def sheet(real: torch.Tensor, generated: torch.Tensor) -> Image.Image:
    """Put real digits above generated ones, `(rows * 10, 16, 16)` each, ten in a row, dark on light."""
    padded = (nn.functional.pad(each, (1, 1, 1, 1), value=-1.0) for each in (real, generated))
    blocks = [rearrange(each, "(r c) y x -> (r y) (c x)", c=10) for each in padded]
    line = torch.ones(1, blocks[0].shape[1])
    pixels = ((1 - torch.cat([blocks[0], line, blocks[1]])) * 127.5).clamp(0, 255).byte()
    height, width = pixels.shape
    image = Image.frombytes("L", (width, height), bytes(pixels.flatten().tolist()))
    return image.resize((4 * width, 4 * height), Image.Resampling.NEAREST)


def check(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    """Refuse, before the training and not after it, what cannot work."""
    for name in SETTINGS:
        if getattr(asked, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if asked.picture and asked.images % 10:
        parser.error("--picture shows ten digits in a row, so --images must be a multiple of 10")
    if asked.picture and not (asked.picture.suffix == ".png" and asked.picture.parent.is_dir()):
        parser.error("--picture must be the name of a .png file in a folder that exists")
    try:
        with attnreg.use(asked.backend):
            pass
    except attnreg.AttnregError as error:
        parser.error(f"--backend: {error}")


def main() -> None:
    """Train, draw digits, compare backends, and say how many digits can be recognised."""
    parser = argparse.ArgumentParser(description="Train a diffusion transformer on captioned digits.")
    parser.add_argument("--backend", default="auto", help="a name of `attnreg list`, or auto")
    parser.add_argument("--picture", type=Path, help="file for real and generated digits, such as digits.png")
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    check(parser, asked)

    torch.manual_seed(0)
    model, begun = DiffusionTransformer(asked.layers), time.perf_counter()
    with attnreg.use(asked.backend):
        losses = train(model, asked.steps, asked.batch)
    last = losses[-math.ceil(asked.steps / 20) :]
    print(f"loss {losses[0]:.2f} at first, {sum(last) / len(last):.2f} at the end of {asked.steps} steps", end="")
    print(f" in {time.perf_counter() - begun:.0f} s on {asked.backend}")

    labels, noise = torch.arange(asked.images) % 10, torch.randn(asked.images, SIDE, SIDE)
    with attnreg.use(asked.backend):
        images = draw(model, noise, captions(labels))
        longer = draw(model, noise, captions(labels, 8))
    print(f"captions padded to 8 letters in place of 5 change pixels by {(longer - images).abs().max():.0e}")
    others = [name for name in ("eager", "sdpa_math", "flex_attention") if name != asked.backend]
    for name in others:  # none of them is what auto chooses here, which is sdpa
        with attnreg.use(name):
            print(f"{name:14} changes pixels by {(draw(model, noise, captions(labels)) - images).abs().max():.0e}")
    real, theirs = digits(200)
    print(f"recognised by the nearest neighbour: {right(images, labels):.0%} of generated digits, ", end="")
    print(f"{right(real, theirs):.0%} of real ones")
    if asked.picture:
        sheet(real[:30], images[:60]).save(asked.picture)


if __name__ == "__main__":
    main()
