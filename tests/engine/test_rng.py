import pytest
import torch

from norm_matters.engine.rng import restore_rng, rng_state


class Machine:
    """GPUs whose random streams are numbers."""

    def __init__(self, streams: list[int], current: int) -> None:
        self.streams, self.current = streams, current

    def get(self) -> torch.Tensor:
        return torch.tensor(self.streams[self.current])

    def put(self, stream: torch.Tensor, device: int | None = None) -> None:
        self.streams[self.current if device is None else device] = int(stream)


@pytest.fixture
def on(monkeypatch):
    def enter(streams: list[int], current: int) -> Machine:
        machine = Machine(streams, current)
        for name, value in (
            ("is_available", lambda: True),
            ("device_count", lambda: len(machine.streams)),
            ("get_rng_state", machine.get),
            ("get_rng_state_all", lambda: [torch.tensor(stream) for stream in machine.streams]),
            ("set_rng_state", machine.put),
        ):
            monkeypatch.setattr(torch.cuda, name, value)
        return machine

    return enter


@pytest.mark.parametrize(("gpus", "current"), [(4, 1), (8, 5), (1, 0)])
def test_the_stream_of_the_own_gpu_goes_on_whatever_its_number(on, gpus, current):
    """Two machines of four GPUs, one of eight, eight tasks that see one each: a rank's own has other numbers."""
    on([10, 11, 12, 13], 1)
    saved = rng_state()
    machine = on([0] * gpus, current)
    restore_rng(*saved)
    assert machine.streams[current] == 11


def test_streams_of_old_checkpoints_go_by_number(on):
    on([10, 11], 1)
    tensors, numbers = rng_state()
    del tensors["cuda"]
    machine = on([0, 0, 0], 0)
    restore_rng(tensors, numbers)
    assert machine.streams == [10, 11, 0]
