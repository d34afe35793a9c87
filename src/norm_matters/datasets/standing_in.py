"""Training images that cannot be read: another of the same class stands in, the same one in every process.

Evaluation knows nothing of this: a score over fewer images, or over some twice, would be another score.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.core.seeding import uniform_of

# Which of an image's random numbers says who stands in for it; those below belong to its transforms.
STREAM = 64
# Names that a message tells.
_TOLD = 5


class UnreadableImageError(UserError):
    """An image cannot be read; the message names it and says why."""


def images_to_skip(policy: str) -> int:
    """How many images of a training set may be unreadable: 0 for `fail`, N for `skip:N`."""
    return int(policy.removeprefix("skip:")) if policy.startswith("skip:") else 0


def stand_ins(labels: np.ndarray, index: int, *, seed: int, epoch: int, count: int) -> Iterator[int]:
    """The numbers of other images of an image's class, the first choice first; a function of the arguments alone.

    Args:
        labels: (N,) class of each image.
        count: how many at most.
    """
    members = np.flatnonzero(labels == labels[index])
    first = int(uniform_of(seed=seed, epoch=epoch, index=index, stream=STREAM) * len(members))
    others = (int(members[(first + place) % len(members)]) for place in range(len(members)))
    return islice((other for other in others if other != index), count)


def check_unreadable(found: dict[str, str], allowed: int) -> None:
    """Raise UserError where more images cannot be read than are allowed.

    Args:
        found: name of each image -> why.
        allowed: how many may be.
    """
    if len(found) <= allowed:
        return
    shown = "; ".join(list(found.values())[:_TOLD])
    more = f"; and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
    raise UserError(f"data.bad_images: skip:{allowed} allows {allowed}, and {len(found)} cannot be read: {shown}{more}")
