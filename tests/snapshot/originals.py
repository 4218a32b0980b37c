"""The networks of other programs, rewritten as small as can be: names and arithmetic are theirs.

Nothing here is taken from our network, so that a conversion is held against something that it wasn't made from.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


# pesser/pytorch_diffusion (and ermongroup/ddim)


def pesser_embedding(t: Tensor, channels: int) -> Tensor:
    half = channels // 2
    steps = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angle = t.float()[:, None] * steps[None, :]
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)


class PesserBlock(nn.Module):
    def __init__(self, inputs: int, out: int, temb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inputs, eps=1e-6), nn.Conv2d(inputs, out, 3, padding=1)
        self.temb_proj = nn.Linear(temb, out)
        self.norm2, self.conv2 = nn.GroupNorm(32, out, eps=1e-6), nn.Conv2d(out, out, 3, padding=1)
        if inputs != out:
            self.nin_shortcut = nn.Conv2d(inputs, out, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PesserAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (f(y).reshape(b, c, h * w) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k * c**-0.5, dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).reshape(b, c, h, w))


class Pesser(nn.Module):
    def __init__(self, ch: int, mult: tuple[int, ...], blocks: int, attention: tuple[int, ...], size: int) -> None:
        super().__init__()
        self.ch, self.blocks, self.mult = ch, blocks, mult
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down, self.up, now = nn.ModuleList(), nn.ModuleList(), ch
        skips = [ch]
        for level, m in enumerate(mult):
            part = nn.Module()
            part.block, part.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks):
                part.block.append(PesserBlock(now, m * ch, 4 * ch))
                now = m * ch
                skips.append(now)
                if size >> level in attention:
                    part.attn.append(PesserAttention(now))
            if level != len(mult) - 1:
                part.downsample = nn.Module()
                part.downsample.conv = nn.Conv2d(now, now, 3, stride=2, padding=0)
                skips.append(now)
            self.down.append(part)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1 = PesserBlock(now, now, 4 * ch), PesserAttention(now)
        self.mid.block_2 = PesserBlock(now, now, 4 * ch)
        parts = []
        for level in reversed(range(len(mult))):
            part = nn.Module()
            part.block, part.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks + 1):
                part.block.append(PesserBlock(now + skips.pop(), mult[level] * ch, 4 * ch))
                now = mult[level] * ch
                if size >> level in attention:
                    part.attn.append(PesserAttention(now))
            if level:
                part.upsample = nn.Module()
                part.upsample.conv = nn.Conv2d(now, now, 3, padding=1)
            parts.insert(0, part)
        self.up.extend(parts)
        self.norm_out, self.conv_out = nn.GroupNorm(32, now, eps=1e-6), nn.Conv2d(now, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](pesser_embedding(t, self.ch))))
        hs = [self.conv_in(x)]
        for level, part in enumerate(self.down):
            for j in range(self.blocks):
                h = part.block[j](hs[-1], temb)
                hs.append(part.attn[j](h) if len(part.attn) else h)
            if level != len(self.mult) - 1:
                hs.append(part.downsample.conv(F.pad(hs[-1], (0, 1, 0, 1))))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hs[-1], temb)), temb)
        for level in reversed(range(len(self.mult))):
            part = self.up[level]
            for j in range(self.blocks + 1):
                h = part.block[j](torch.cat([h, hs.pop()], dim=1), temb)
                h = part.attn[j](h) if len(part.attn) else h
            if level:
                h = part.upsample.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))


# w86763777/pytorch-ddpm


class W8Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels)
        self.proj_q, self.proj_k, self.proj_v, self.proj = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.group_norm(x)
        q = self.proj_q(y).permute(0, 2, 3, 1).view(b, h * w, c)
        k, v = self.proj_k(y).view(b, c, h * w), self.proj_v(y).permute(0, 2, 3, 1).view(b, h * w, c)
        out = torch.bmm(torch.softmax(torch.bmm(q, k) * c**-0.5, dim=-1), v)
        return x + self.proj(out.view(b, h, w, c).permute(0, 3, 1, 2))


class W8Block(nn.Module):
    def __init__(self, inputs: int, out: int, temb: int, attention: bool) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.GroupNorm(32, inputs), Swish(), nn.Conv2d(inputs, out, 3, padding=1))
        self.temb_proj = nn.Sequential(Swish(), nn.Linear(temb, out))
        self.block2 = nn.Sequential(nn.GroupNorm(32, out), Swish(), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1))
        self.shortcut = nn.Conv2d(inputs, out, 1) if inputs != out else nn.Identity()
        self.attn = W8Attention(out) if attention else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.block1(x) + self.temb_proj(temb)[:, :, None, None]
        return self.attn(self.block2(h) + self.shortcut(x))


class W8Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.main(x)


class W8Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.main(F.interpolate(x, scale_factor=2, mode="nearest"))


class W8(nn.Module):
    def __init__(self, steps: int, ch: int, mult: tuple[int, ...], attention: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        table = torch.exp(-torch.arange(0, ch, step=2) / ch * math.log(10000))
        table = torch.arange(steps).float()[:, None] * table[None, :]
        table = torch.stack([torch.sin(table), torch.cos(table)], dim=-1).view(steps, ch)
        self.time_embedding = nn.Module()
        self.time_embedding.timembedding = nn.Sequential(
            nn.Embedding.from_pretrained(table), nn.Linear(ch, 4 * ch), Swish(), nn.Linear(4 * ch, 4 * ch)
        )
        self.head = nn.Conv2d(3, ch, 3, padding=1)
        self.downblocks, self.upblocks, skips, now = nn.ModuleList(), nn.ModuleList(), [ch], ch
        for i, m in enumerate(mult):
            for _ in range(blocks):
                self.downblocks.append(W8Block(now, ch * m, 4 * ch, i in attention))
                now = ch * m
                skips.append(now)
            if i != len(mult) - 1:
                self.downblocks.append(W8Down(now))
                skips.append(now)
        self.middleblocks = nn.ModuleList([W8Block(now, now, 4 * ch, True), W8Block(now, now, 4 * ch, False)])
        for i, m in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.upblocks.append(W8Block(skips.pop() + now, ch * m, 4 * ch, i in attention))
                now = ch * m
            if i:
                self.upblocks.append(W8Up(now))
        self.tail = nn.Sequential(nn.GroupNorm(32, now), Swish(), nn.Conv2d(now, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = self.time_embedding.timembedding(t)
        hs = [self.head(x)]
        for layer in self.downblocks:
            hs.append(layer(hs[-1], temb))
        h = hs[-1]
        for layer in self.middleblocks:
            h = layer(h, temb)
        for layer in self.upblocks:
            h = layer(torch.cat([h, hs.pop()], dim=1) if isinstance(layer, W8Block) else h, temb)
        return self.tail(h)


# OpenAI's improved- and guided-diffusion


def openai_embedding(t: Tensor, channels: int) -> Tensor:
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angle = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class OpenAiDown(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class OpenAiUp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class OpenAiBlock(nn.Module):
    def __init__(self, inputs: int, emb: int, out: int, scale_shift: bool, resample: str = "") -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == out else nn.Conv2d(inputs, out, 1)

    def change(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.change(self.in_layers[1](self.in_layers[0](x))))
        x, emb = self.change(x), self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class OpenAiAttention(nn.Module):
    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm, self.qkv = nn.GroupNorm(32, channels), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        flat = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(flat))
        width = c // self.heads
        if self.new_order:
            q, k, v = (part.reshape(b * self.heads, width, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(b * self.heads, 3 * width, -1).split(width, dim=1)
        scale = 1 / math.sqrt(math.sqrt(width))
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        h = torch.einsum("bts,bcs->bct", weights, v).reshape(b, c, -1)
        return (flat + self.proj_out(h)).reshape(b, c, *spatial)


class Embedded(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, OpenAiBlock) else layer(x)
        return x


class OpenAi(nn.Module):
    def __init__(
        self, ch: int, mult: tuple[int, ...], blocks: int, attention: tuple[int, ...], *, size: int,
        head_channels: int = 0, heads: int = 1, scale_shift: bool = False, updown: bool = False,
        new_order: bool = False, classes: int = 0, learn_sigma: bool = False, rescale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.ch, self.rescale = ch, rescale
        emb = 4 * ch

        def block(inputs: int, out: int, resample: str = "") -> OpenAiBlock:
            return OpenAiBlock(inputs, emb, out, scale_shift, resample)

        def attend(channels: int) -> OpenAiAttention:
            return OpenAiAttention(channels, channels // head_channels if head_channels else heads, new_order)

        self.time_embed = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        if classes:
            self.label_emb = nn.Embedding(classes, emb)
        self.input_blocks = nn.ModuleList([Embedded(nn.Conv2d(3, ch, 3, padding=1))])
        now, skips = ch, [ch]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                layers: list[Any] = [block(now, m * ch)]
                now = m * ch
                if size >> level in attention:
                    layers.append(attend(now))
                self.input_blocks.append(Embedded(*layers))
                skips.append(now)
            if level != len(mult) - 1:
                self.input_blocks.append(Embedded(block(now, now, "down") if updown else OpenAiDown(now)))
                skips.append(now)
        self.middle_block = Embedded(block(now, now), attend(now), block(now, now))
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                layers = [block(now + skips.pop(), m * ch)]
                now = m * ch
                if size >> level in attention:
                    layers.append(attend(now))
                if level and i == blocks:
                    layers.append(block(now, now, "up") if updown else OpenAiUp(now))
                self.output_blocks.append(Embedded(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, 6 if learn_sigma else 3, 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(openai_embedding(t.float() * self.rescale, self.ch))
        if y is not None:
            emb = emb + self.label_emb(y)
        hs, h = [], x
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, hs.pop()], dim=1), emb)
        return self.out(h)
