"""Measurements of a trained model, each a function to a flat dict of numbers.

``PROBES[name](model, images, labels, generator, **params)``: images float (N, C, H, W) in [0, 1],
or (N, 2) points; labels int64 (N,); one ``torch.Generator`` for all that is random, None for the
global one. The model runs in eval mode and comes back as it was. ``samples``: how many of the
samples are taken, at random, None for all of them.
"""

from ses_lab.probes import attacks, corruption, geometry, representation

GIVEN = ("model", "images", "labels", "generator")
PROBES = {
    "corruption": corruption.corruption,
    "fgsm": attacks.fgsm,
    "pgd": attacks.pgd,
    "complexity": geometry.complexity,
    "sharpness": geometry.sharpness,
    "hessian": geometry.hessian,
    "gradient_alignment": geometry.gradient_alignment,
    "jacobian": geometry.jacobian,
    "ranks": representation.ranks,
    "dead_units": representation.dead_units,
    "collapse": representation.collapse,
}
