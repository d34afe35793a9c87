"""What would run code out of a file, or fetch it, stands nowhere in the package but in the places named here."""

import ast
from pathlib import Path

import pytest
import torch

from norm_matters.core.errors import UserError
from norm_matters.models import old_files

SOURCE = Path(__file__).parents[2] / "src" / "norm_matters"

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "code",
    "codeop",
    "runpy",
}
# By the last part of a call's name, or two parts where the last alone says too little.
CALLS = {
    *("eval", "exec", "compile", "__import__", "execfile"),
    *("torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "np.load", "numpy.load"),
    *("hub.load", "hub.load_state_dict_from_url", "hub.download_url_to_file", "hub.help", "hub.list"),
    *("gather_object", "all_gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list"),
    *("os.system", "os.popen", "extractall", "extract", "unpack_archive", "trust_remote_code", "import_module"),
    *("urlopen", "urlretrieve", "jit.load", "export.load", "package_importer"),
}
WORDS = {"torch.distributed.checkpoint", "torch.package", "torch.hub.load"}

ALLOWED = {
    # A user's own model, after its content was found to be trusted (models.trust).
    ("models/user_file.py", "exec"),
    ("models/user_file.py", "compile"),
    # weights_only=True, and behind the checks of the archive.
    ("models/old_files.py", "torch.load"),
    # A function of that name.
    ("bench/norm_arms.py", "compile"),
    # Names out of tables in the code.
    ("__init__.py", "import_module"),
    ("cli.py", "import_module"),
    ("bench/input.py", "import_module"),
    ("core/lazy.py", "import_module"),
    ("experiments/statistics.py", "import_module"),
    ("core/registry.py", "import_module"),
    ("norms/kernels/dispatch.py", "import_module"),
    ("norms/timm.py", "import_module"),
}
NO_CODE = {"re.compile", "torch.compile"}


def dotted(node: ast.AST) -> str:
    """`torch.hub.load` of a call's function, as far as it is made of names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(text: str, file: str) -> set[tuple[str, str]]:
    """(file, what) for all that could run code."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            found |= {(file, name) for name in names if name.split(".")[0] in MODULES or name in WORDS}
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            parts = name.split(".")
            hits = {".".join(parts[-2:]), parts[-1]} & CALLS
            method = isinstance(node.func, ast.Attribute) and parts[-1] in ("eval", "compile")
            if hits and name not in NO_CODE and not method:
                found.add((file, min(hits, key=len) if parts[-1] in CALLS else hits.pop()))
            found |= {(file, word.arg) for word in node.keywords if word.arg in ("allow_pickle", "trust_remote_code")}
    return found


def test_nothing_in_the_package_runs_what_is_in_a_file() -> None:
    found = set()
    for path in sorted(SOURCE.rglob("*.py")):
        found |= findings(path.read_text(), str(path.relative_to(SOURCE)))
    assert found - ALLOWED == set()
    assert {("models/user_file.py", "exec"), ("models/old_files.py", "torch.load")} <= found, "the search is blind"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "import marshal, json",
        "torch.load(path)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "torch.hub.load(name)",
        "dist.gather_object(value)",
        "dist.broadcast_object_list([value])",
        "from torch.distributed import checkpoint; from torch.distributed.checkpoint import load",
        "archive.extractall(path)",
        "os.system(text)",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert findings(line, "file.py")


def test_torch_load_is_told_to_take_no_code_and_nothing_else_is_asked_for() -> None:
    tree = ast.parse((SOURCE / "models" / "old_files.py").read_text())
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func) == "torch.load"]
    words = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    assert words == {"map_location": "cpu", "weights_only": True}


@pytest.mark.parametrize(
    ("version", "taken"), [("2.9.1+cu128", False), ("2.10.0", True), ("2.13.0+cpu", True), ("3.0.0a1", True)]
)
def test_an_older_torch_opens_no_pickle(
    version: str, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "file.pt")
    monkeypatch.setattr(torch, "__version__", version)
    if taken:
        assert old_files.load_plain(tmp_path / "file.pt")["state_dict"]["a"].sum() == 2
    else:
        with pytest.raises(UserError, match=r"torch 2\.9\.1.* is not safe .* 2\.10 or later"):
            old_files.load_plain(tmp_path / "file.pt")
