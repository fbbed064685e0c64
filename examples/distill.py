"""Learn a few images such that networks trained on them do well on real ones, and study what they do.

    python examples/distill.py images --quick                       under a minute: ten digits for one network
    python examples/distill.py images --seeds 0 1 2                 ten images for one LeNet, MNIST
    python examples/distill.py images --initialization random --networks 4 --per-class 10 --steps 10 \
        --epochs 1 --optimizer adam --other-networks convnet mlp    a hundred, for networks nobody has seen
    python examples/distill.py images --initialization random --networks 4 --devices 4      a device for each
    python examples/distill.py images --initialization pretrained --source digits --image-size 28
    python examples/distill.py images --initialization pretrained --outer misclassify --attacked 0 --target 1
    python examples/distill.py kernel                               in closed form: kernel inducing points
    python examples/distill.py kernel --kernel features             by features of networks that train, too
    python examples/distill.py linear                               how many images a linear model needs
    python examples/distill.py collapse --sets runs/distill-images/seed0.safetensors
                                                                    neural collapse on distilled data
    python examples/distill.py images --resume                      continue what was killed
    python examples/distill.py images --help                        everything else

The output folder of `images` gets the sets (seedN.safetensors, seedN-images.png), every outer step
(seedN-history.csv), what networks trained on them and on the baselines make of the test images (seedN.json,
summary.csv and .json), figures and checkpoints. What the studies found: docs/evidence/distill-example.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from distillation.collapse import CollapseSettings, collapse_study
from distillation.images import learn_images
from distillation.images_settings import ImagesSettings
from distillation.kernel import learn_kernel_set
from distillation.kernel_settings import KernelSettings
from distillation.linear import LinearSettings, linear_case
from lab.options import command
from lab.progress import make_console
from lab.ranks import end_with, launch, launched

STUDIES = {
    ImagesSettings: learn_images,
    KernelSettings: learn_kernel_set,
    LinearSettings: linear_case,
    CollapseSettings: collapse_study,
}
Settings = (
    Annotated[ImagesSettings, tyro.conf.subcommand("images")]
    | Annotated[KernelSettings, tyro.conf.subcommand("kernel")]
    | Annotated[LinearSettings, tyro.conf.subcommand("linear")]
    | Annotated[CollapseSettings, tyro.conf.subcommand("collapse")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the studies from the command line and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def run(settings: Any) -> None:
        if isinstance(settings, ImagesSettings) and settings.devices > 1 and not launched():
            launch(__file__, arguments, settings.devices)
        else:
            STUDIES[type(settings)](settings, make_console())

    return command(Settings, run, arguments)


if __name__ == "__main__":
    end_with(main)
