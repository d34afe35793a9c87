"""torchvision can be imported whatever torch was built for, through one door."""

from pathlib import Path

import torch

import norm_matters


def test_it_imports_and_its_networks_run() -> None:
    from norm_matters.core.torchvision import torchvision

    network = torchvision.models.squeezenet1_1(num_classes=3).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_no_other_file_imports_it_first() -> None:
    package = Path(norm_matters.__file__).parent
    importing = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any(
            line.strip().startswith(("import torchvision", "from torchvision"))
            for line in path.read_text().splitlines()
        )
    }
    assert importing == {"core/torchvision.py"}
