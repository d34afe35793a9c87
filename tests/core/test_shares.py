import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from norm_matters.core.shares import chunk_sizes, share, share_sizes


@given(images=st.integers(1, 200), chunks=st.integers(1, 9), world=st.integers(1, 5))
def test_shares_are_a_partition_of_every_chunk(images: int, chunks: int, world: int) -> None:
    batch = np.random.default_rng(0).permutation(images)
    parts = [share(batch, chunks, rank=rank, world=world) for rank in range(world)]
    assert sorted(np.concatenate(parts)) == list(range(images))
    sizes = [share_sizes(images, chunks, rank=rank, world=world) for rank in range(world)]
    assert [len(part) for part in parts] == [sum(own) for own in sizes]
    whole = chunk_sizes(images, chunks)
    assert whole == [len(chunk) for chunk in torch.arange(images).chunk(chunks)]
    for number, chunk in enumerate(torch.from_numpy(batch).chunk(chunks)):
        own = [size[number] for size in sizes]
        assert sum(own) == whole[number]
        assert max(own) - min(own) <= 1
        taken = [part[sum(size[:number]) :][: size[number]] for part, size in zip(parts, sizes, strict=True)]
        assert np.concatenate(taken).tolist() == chunk.tolist()  # consecutive, rank after rank
