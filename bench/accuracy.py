"""python -m bench.accuracy: errors of H and dH/dx on easy and hard spectra, float32 samples.

For every family of spectra and every route the worst |g - g64| / |g64| and |H - H64| over shapes
and seeds. The reference is a float64 SVD of the same float32 numbers: rounding them is part of the
data, not an error, and floors the steepest spectra at about 1e-8 of the largest singular value,
within reach of float64.

What to look for: ours no worse than plain PyTorch in any row, and gradients right to 1e-4 on the
i^-4, exponential and bfloat16-rounded spectra, where a float32 Gram matrix loses the eigenvalues
below 1e-7 of its trace, and with them 1e-3 of the gradient and more. A relative error says little
where one direction has all the variance: at collapse 1e-6 and rank 1 the exact gradient is 6e-5 and
2e-6 of its usual size 1 / |Xc|, below what float32 shows of its large terms.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.provenance import add_isa, add_output, with_commit, write
from bench.providers import Provider, gram_closed, ours, svdvals

SHAPES = [(64, 128), (128, 256), (256, 512), (512, 96)]
SEEDS = 3
ROUTES = [
    Provider("ours, auto", ours),
    Provider("ours, eigh", partial(ours, solver="eigh")),
    Provider("ours, rational", partial(ours, solver="rational")),
    Provider("torch Gram + eigh, closed form", gram_closed),
    Provider("torch svdvals, autograd", svdvals),
]

Family = Callable[[int, int, torch.Generator], Tensor]  # (B, d) in float64


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _spectrum(sigma: Callable[[Tensor], Tensor]) -> Family:
    """Singular values sigma(i), i = 1 ... n, between random orthogonal bases."""

    def make(B: int, d: int, g: torch.Generator) -> Tensor:
        n = min(B, d)
        u, _ = torch.linalg.qr(_normal(B, n, generator=g))
        v, _ = torch.linalg.qr(_normal(d, n, generator=g))
        return (u * sigma(torch.arange(1, n + 1, dtype=torch.float64))) @ v.mT

    return make


def _rank(k: int) -> Family:
    return lambda B, d, g: _normal(B, k, generator=g) @ _normal(k, d, generator=g)


def _collapse(rest: float) -> Family:
    """One direction, and Gaussian noise ``rest`` times as large."""
    return lambda B, d, g: _rank(1)(B, d, g) + rest * _normal(B, d, generator=g)


FAMILIES: dict[str, Family] = {
    "Gaussian": lambda B, d, g: _normal(B, d, generator=g),
    "i^-1": _spectrum(lambda i: i**-1),
    "i^-2": _spectrum(lambda i: i**-2),
    "i^-4": _spectrum(lambda i: i**-4),
    "exponential, 2^-i": _spectrum(lambda i: 2**-i),
    "collapse 1e-3": _collapse(1e-3),
    "collapse 1e-6": _collapse(1e-6),
    "rank 5 in bfloat16": lambda B, d, g: _rank(5)(B, d, g).bfloat16().double(),
    "rank 1": _rank(1),
    "duplicated rows": lambda B, d, g: _normal((B + 1) // 2, d, generator=g).repeat(2, 1)[:B],
    "large mean": lambda B, d, g: _normal(B, d, generator=g) + 100 * _normal(d, generator=g),
}


def reference(x: Tensor) -> tuple[Tensor, Tensor]:  # (B, d) -> (), (B, d) float64
    """H and dH/dx from the SVD, Xc = U diag(sigma) V^T; a zero singular value adds nothing."""
    x = x.double()
    xc = x - x[:1]
    u, sigma, vt = torch.linalg.svd(xc - xc.mean(0), full_matrices=False)
    p = sigma**2 / (sigma**2).sum()
    h = torch.special.entr(p).sum()
    # dH/dsigma_i = -2 sigma_i (log p_i + H) / sum sigma^2, and dH/dx = U diag(dH/dsigma) V^T
    slope = -2 * sigma * (torch.where(p > 0, p, 1.0).log() + h) / (sigma**2).sum()
    return h, (u * slope) @ vt


def errors(route: Provider, x: Tensor) -> tuple[float, float]:
    """|g - g64| / |g64| and |H - H64|."""
    x = x.detach().requires_grad_()
    h = route.entropies([x]).sum()
    (g,) = torch.autograd.grad(h, x)
    h64, g64 = reference(x.detach())
    return ((g - g64).norm() / g64.norm()).item(), (h - h64).abs().item()


def measure(device: str, shapes: list[tuple[int, int]], seeds: int) -> list[dict]:
    """A row for each family and route: the worst over shapes and seeds."""
    facts = {"dtype": "float32", "shapes": shapes, "seeds": seeds, **with_commit(device)}
    rows = []
    for family, make in FAMILIES.items():
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        xs = [make(B, d, g).float().to(device) for B, d in shapes for g in generators]
        for route in ROUTES:
            worst = torch.tensor([errors(route, x) for x in xs]).amax(0)  # NaN wins
            gradient, value = worst.tolist()
            row = {"family": family, "route": route.name, "gradient": gradient, "value": value}
            rows.append(row | facts)
    return rows


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(row["route"] for row in rows))
    cells = {(r["family"], r["route"]): f"{r['gradient']:.0e} / {r['value']:.0e}" for r in rows}
    lines = [f"| gradient / H | {' | '.join(names)} |", "|" + "---|" * (1 + len(names))]
    for family in dict.fromkeys(row["family"] for row in rows):
        lines.append(f"| {family} | {' | '.join(cells[family, name] for name in names)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--shapes",
        type=lambda text: tuple(map(int, text.split("x"))),
        nargs="+",
        default=SHAPES,
        metavar="BxD",
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    add_isa(parser)
    add_output(parser)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = measure(device, options.shapes, options.seeds)
    write(rows, options.output)
    print(table(rows))


if __name__ == "__main__":
    main()
