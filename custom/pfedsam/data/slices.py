"""Volumes as slices for training: what is drawn in an epoch, and the pre-drawn augmentations of each slice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from monai.transforms import MapTransform, Randomizable
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from pfedsam.data.prepared import PreparedVolumes
from pfedsam.errors import ErrorCode, PFedSAMError

Grey = Literal["neighbours", "same"]

#: Key of an item under which an augmentation finds `OtherSlices`.
OTHERS = "others"


def slice_channels(volume: Tensor, index: int | None = None, grey: Grey = "neighbours") -> Tensor:
    """The three input channels of a grey volume; a volume of three channels has them already.

    Args:
        volume: `(1, H, W, D)`, or `(3, H, W, D)` in colour.
        index: of one slice, or None for all.
        grey: `neighbours` for the slice before, the slice and the slice after (the outermost slices are repeated),
            `same` for the slice three times.

    Returns:
        `(3, H, W)` for one slice, `(3, H, W, D)` for all: a view of one channel, to be read only, which takes no more
        memory than the volume.
    """
    if len(volume) == 3:
        return volume if index is None else volume[..., index]
    depth = volume.shape[-1]
    if index is not None:
        offsets = (-1, 0, 1) if grey == "neighbours" else (0, 0, 0)
        return torch.cat([volume[..., min(max(index + offset, 0), depth - 1)] for offset in offsets])
    if grey == "same":
        return volume.expand(3, *volume.shape[1:])
    # windows of D slices that start at the repeated first one, at the first, and at the second
    padded = torch.cat([volume[..., :1], volume, volume[..., -1:]], -1)
    return padded[0].unfold(-1, depth, 1).movedim(2, 0)


class SliceChannelsd(MapTransform):
    """Dictionary transform: `(1, H, W, D)` to the three input channels `(3, H, W, D)` of every slice."""

    #: So nothing is stored of it, see `pfedsam.data.prepared`.
    gives_a_view = True

    def __init__(self, keys: Any, grey: Grey = "neighbours") -> None:
        super().__init__(keys)
        self.grey: Grey = grey

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Apply to every key."""
        return {**data, **{key: slice_channels(data[key], grey=self.grey) for key in self.key_iterator(dict(data))}}


class SliceDataset(Dataset[Any]):
    """Slices of volumes; item `slice * variants + variant`.

    A variant is one pre-drawn augmentation. It is a function of `(seed, item)`, so features of its frozen trunk can be
    cached and a run can be repeated. With one variant there is no augmentation.

    Args:
        data: items with `image` and `label` paths, unlabelled ones without the second (`pfedsam.data.sites.datalist`).
        transform: of a volume, deterministic: gives `image` `(1, H, W, D)` and `label` `(C, H, W, D)`.
        augment: of a slice, random: MONAI dictionary transforms on `image` `(3, H, W)` and `label` `(C, H, W)`; under
            `others` it finds what else the site has, see `OtherSlices`.
        variants: number K of pre-drawn augmentations of each slice.
        grey: see `slice_channels`.
        seed: of the augmentations.
        kept: see `pfedsam.data.prepared.PreparedVolumes`.

    Raises:
        PFedSAMError: E06 if there is no item or no slice with a label.
    """

    def __init__(
        self,
        data: Sequence[dict[str, Any]],
        transform: Callable[[Any], Any],
        augment: Callable[[Any], Any] | None = None,
        variants: int = 4,
        grey: Grey = "neighbours",
        seed: int = 0,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        self.volumes = PreparedVolumes(data, transform, kept=kept)
        self.augment, self.grey, self.seed = augment, grey, seed
        self.variants = variants if augment is not None else 1
        self.slices: list[tuple[int, int]] = []
        #: For each labelled volume: indices into `slices` with and without a label; an unlabelled one has neither.
        self.positive: list[list[int]] = []
        self.negative: list[list[int]] = []
        #: For each volume: indices into `slices` of an unlabelled one.
        self.unlabelled: list[list[int]] = []
        for number, item in enumerate(data):
            has_label, first = self.volumes.labelled(number), len(self.slices)
            every = range(first, first + len(has_label))
            self.slices += [(number, z) for z in range(len(has_label))]
            told = "label" in item
            self.positive.append([one for one, found in zip(every, has_label, strict=True) if told and found])
            self.negative.append([one for one, found in zip(every, has_label, strict=True) if told and not found])
            self.unlabelled.append([] if told else list(every))
        if not any(self.positive):
            raise PFedSAMError(
                ErrorCode.TOO_FEW_CASES, "no training case has a labelled slice.", "Check the split and the labels."
            )

    def __len__(self) -> int:
        return len(self.slices) * self.variants

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, _ = self.slices[index // self.variants]
        item: dict[str, Any] = self.plain(index // self.variants)
        if self.augment is not None:
            item[OTHERS] = OtherSlices(self, number)
            if isinstance(self.augment, Randomizable):
                self.augment.set_random_state(seed=int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0]))
            item = self.augment(item)
        return {key: convert_to_tensor(item[key]).float().contiguous() for key in ("image", "label")} | {"index": index}

    def plain(self, number: int) -> dict[str, Tensor]:
        """`image` `(3, H, W)` and `label` `(C, H, W)` of a slice, by its place in `slices`, without augmentation."""
        volume, z = self.slices[number]
        first = max(z - 1, 0)
        around = self.volumes.window(volume, first, min(z + 2, len(self.volumes.labelled(volume))))
        return {
            "image": slice_channels(around["image"], z - first, self.grey),
            "label": around["label"][..., z - first].float(),
        }


class OtherSlices:
    """What an augmentation may take from the site's other cases. Nothing is read before `draw`.

    Which slice it is depends on nothing but the data and the random state, so that a variant stays a function of
    `(seed, item)`: also slices are drawn of cases that a fold leaves out.

    Args:
        dataset: the slices of the site.
        number: of the volume that is augmented.
    """

    def __init__(self, dataset: SliceDataset, number: int) -> None:
        self.dataset, self.number = dataset, number

    def draw(self, random: np.random.RandomState) -> Tensor:
        """`(3, H, W)`: a slice with a label of another case, without augmentation; of the same case if it is alone."""
        cases = [case for case, slices in enumerate(self.dataset.positive) if slices]
        others = [case for case in cases if case != self.number] or cases
        slices = self.dataset.positive[others[random.randint(len(others))]]
        return self.dataset.plain(slices[random.randint(len(slices))])["image"]


class EpochSampler(Sampler[int]):
    """The slices of an epoch: of every case at most so many with and without a label, in random order.

    Every epoch has the same number of slices, so that all strategies get the same number of steps. Slices of unlabelled
    cases are drawn beside them where `unlabelled_share` asks for some.

    Args:
        dataset: the slices.
        positives_per_case: at most so many slices with a label of a case.
        negatives_per_case: at most so many slices without; never more than half of the positives over all cases, so
            that positive : negative is at least 2 : 1.
        seed: the draw is a function of `(seed, draw)`, see `set_draw`.
    """

    def __init__(
        self, dataset: SliceDataset, positives_per_case: int = 8, negatives_per_case: int = 4, seed: int = 0
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self._most = positives_per_case, negatives_per_case
        self.unlabelled_share = 0.0
        self.leave_out(())
        self.draw: tuple[int, ...] = (0,)

    def leave_out(self, volumes: Collection[int]) -> None:
        """Draw nothing of some volumes from now on, and of all others again."""
        positives, negatives = self._most
        cases = zip(self.dataset.positive, self.dataset.negative, strict=True)
        self.take = [
            (0, 0) if number in volumes else (min(positives, len(p)), min(negatives, len(n)))
            for number, (p, n) in enumerate(cases)
        ]
        self.negatives = min(sum(n for _, n in self.take), sum(p for p, _ in self.take) // 2)

    def __len__(self) -> int:
        return self._labelled + self._unlabelled

    @property
    def _labelled(self) -> int:
        return sum(p for p, _ in self.take) + self.negatives

    @property
    def _unlabelled(self) -> int:
        """Slices of unlabelled cases: so many for each of the others, or as many as there are."""
        there = sum(map(len, self.dataset.unlabelled))
        return min(round(self.unlabelled_share * self._labelled), there)

    def set_draw(self, *draw: int) -> None:
        """Choose what the next iteration draws, for example by `(round, phase, epoch)`."""
        self.draw = draw

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, *self.draw])
        chosen: list[int] = []
        empty: list[int] = []
        cases = zip(self.take, self.dataset.positive, self.dataset.negative, strict=True)
        for (positives, negatives), positive, negative in cases:
            chosen += random.choice(positive, positives, replace=False).tolist() if positives else []
            empty += random.choice(negative, negatives, replace=False).tolist() if negatives else []
        chosen += random.choice(empty, self.negatives, replace=False).tolist() if self.negatives else []
        if self._unlabelled:
            every = [one for volume in self.dataset.unlabelled for one in volume]
            chosen += random.choice(every, self._unlabelled, replace=False).tolist()
        variants = random.integers(self.dataset.variants, size=len(chosen))
        items = np.asarray(chosen) * self.dataset.variants + variants
        return iter(random.permutation(items).tolist())
