"""How training restyles what a site has: settings of augmentations, of swapped patches and of mixed images.

None of them sends anything, and none reads anything that is not the site's own.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from pfedsam.training.extra_losses import Number, Settings, Switch, Whole

Probability = Annotated[Number, Field(ge=0, le=1)]


class GIN(Settings):
    """Variants that a random net has restyled, see `pfedsam.data.restyle.RandGINd`.

    Attributes:
        probability: that a variant is restyled.
        layers: convolutions of a random net.
        channels: between two of them.
        alike: one net for all channels of an image, which are slices of one scanner; else each has its own, which also
            changes the hue of a colour picture. [ours]
    """

    probability: Probability = 1.0
    layers: Annotated[Whole, Field(ge=1, le=10)] = 4
    channels: Annotated[Whole, Field(ge=1, le=16)] = 2
    alike: Switch = True


class Amplitude(Settings):
    """Variants with amplitudes of another of the site's cases, see `pfedsam.data.restyle.RandAmplitudeMixd`.

    Attributes:
        probability: that a variant is restyled.
        window: from the centre of the spectrum to the border of what is mixed, as a part of the image's side.
    """

    probability: Probability = 1.0
    window: Annotated[Number, Field(ge=0, le=0.5)] = 0.01


class Augment(Settings):
    """What comes behind a bundle's own augmentations, in this order.

    A variant of a slice stays a function of the seed and the slice: features of it are computed once.

    Attributes:
        amplitude: the lowest frequencies get amplitudes between those of the slice and of another case of the same site
            (after FedDG-ELCFS: Liu et al., arXiv 2103.06030). None: they do not.
        gin: the slice is blended with what a random net makes of it (GIN: Ouyang et al., arXiv 2111.12525; in a
            federation FedGIN, arXiv 2508.05137). None: it is not.
    """

    amplitude: Amplitude | None = None
    gin: GIN | None = None

    def transforms(self) -> list[dict[str, Any]]:
        """As they stand in a bundle's configuration."""
        found: list[dict[str, Any]] = []
        for name, chosen in (("RandAmplitudeMixd", self.amplitude), ("RandGINd", self.gin)):
            if chosen is not None:
                told = chosen.model_dump()
                target = {"_target_": f"pfedsam.data.restyle.{name}", "keys": "image", "prob": told.pop("probability")}
                found.append({**target, **told})
        return found


class PatchSwap(Settings):
    """Patches of the features take mean and spread of other patches of the batch (after CPSS, arXiv 2106.03422).

    `(f_i - mu_i) / sd_i * sd_j + mu_j` for each channel, between the frozen part of the encoder and the rest. Theirs:
    the formula. [ours]: its place, and all that is drawn, since no code was at hand.

    Attributes:
        probability: that a step swaps.
        patches: along each side of the feature map; fewer where its side is no multiple.
    """

    probability: Probability = 0.5
    patches: Annotated[Whole, Field(ge=1, le=16)] = 2


class Mixup(Settings):
    """Images of a batch and their masks are mixed by pairs, `lambda x_i + (1 - lambda) x_j`, `lambda ~ Beta(a, a)`.

    What is mixed is the features behind the frozen part of the encoder (manifold mixup: Verma et al., arXiv
    1806.05236), and not the images, as in DRFLM (arXiv 2204.07742): so they need not be computed anew. [ours] Where one
    of two labels leaves a voxel open, the mixed one does.

    Attributes:
        alpha: a; the smaller, the more is a mixed image that of one of the two.
    """

    alpha: Annotated[Number, Field(gt=0, le=100)] = 0.2
