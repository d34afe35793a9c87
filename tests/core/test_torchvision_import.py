"""torchvision can be imported whatever torch was built for, through one door."""

import subprocess
import sys
from pathlib import Path

import norm_matters


def test_it_imports_in_a_fresh_process() -> None:
    script = (
        "from norm_matters.core.torchvision import torchvision\n"
        "import torchvision.transforms, torchvision.models\n"
        "print(torchvision.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
