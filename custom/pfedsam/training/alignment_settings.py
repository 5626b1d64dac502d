"""How training aligns what the encoder makes of images: settings of warm-up, adversary and episodes.

None of them sends anything, and none reads anything that is not the site's own.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pfedsam.ranges import MOST_ROUNDS
from pfedsam.training.extra_losses import LARGEST_RATE, Factor, Number, Part, Settings, Whole


class WarmUp(Settings):
    """First rounds that train without labels, on all images (after FedCA, arXiv 2010.08982).

    Two views of an image, its features with different parts dropped, are to be more alike than either is to other
    images of the site (InfoNCE: van den Oord et al., arXiv 1807.03748; a dictionary of earlier ones: He et al., arXiv
    1911.05722); and each is to stay near what the SAM that no federation has trained makes of the image. An image is
    the mean of its embedding over all places, scaled to a length of 1.

    Theirs: contrast, dictionary, alignment to a common model. [ours]: the dictionary is the site's own and is forgotten
    at the end of a phase, where theirs travels; the common model is the frozen base; the views.

    Attributes:
        rounds: so many of the first rounds train this loss in place of all others.
        share: slices of cases without a label that an epoch draws for each other slice.
        temperature: of the contrast.
        dictionary: embeddings that are kept as other images.
        alignment: weight of the distance to the base, 1 minus the cosine.
        dropout: share of the features that is dropped.
    """

    rounds: Annotated[Whole, Field(ge=1, le=MOST_ROUNDS)] = 2
    share: Annotated[Number, Field(ge=0, le=20)] = 1.0
    temperature: Annotated[Number, Field(gt=0, le=100)] = 0.1
    dictionary: Annotated[Whole, Field(ge=1, le=100_000)] = 256
    alignment: Factor = 1.0
    dropout: Part = 0.3


class Adversary(Settings):
    """A small network tells slices from restyled ones, and the encoder learns to make that impossible.

    The gradient is reversed between the two (Ganin and Lempitsky, arXiv 1409.7495), after FedDA (arXiv 2509.23907).
    [ours]: the restyled slices are what a random net makes of the site's own, see `pfedsam.data.restyle.RandGINd`,
    where theirs are feature maps of other sites; it sees mean and spread of each channel of the embedding; each phase
    of each round begins with a new one, which never leaves the process. In each step it costs a pass of the trunk and
    two of what follows it in the encoder.

    Attributes:
        weight: of the reversed gradient.
        hidden: width of the discriminator's one hidden layer.
        learning_rate: of the discriminator (AdamW).
    """

    weight: Factor = 0.1
    hidden: Annotated[Whole, Field(ge=1, le=4096)] = 64
    learning_rate: Annotated[Number, Field(gt=0, le=LARGEST_RATE)] = 1e-3


class Episode(Settings):
    """Each step also asks how good the model would be on another style after it (after FedDG-ELCFS, arXiv 2103.06030).

    Beside the gradient of the loss at w comes that of the loss on restyled features at `w - rate * gradient`; both are
    taken together in one update of w: the first order of MAML (Finn et al., arXiv 1703.03400).

    Theirs: an inner step of 0.001 and the loss outside on images of other amplitudes, with second derivatives and a
    contrast of boundaries. [ours]: first order, no contrast, and the style is that of another image of the batch, in
    the features behind the frozen trunk: mean and spread of each channel. A batch of one image has no loss outside.

    Attributes:
        rate: of the inner step.
        weight: of the loss outside.
    """

    rate: Annotated[Number, Field(gt=0, le=LARGEST_RATE)] = 1e-3
    weight: Factor = 1.0
