"""Mutated files of every kind that is read, and what becomes of them: `python benchmarks/fuzz.py N SEED [KIND...]`.

A trial mutates a file that is right and has it read as the commands do. It must end well, or with a UserError of a few
short lines: no other exception, no crash of the process, no hang, no program run, no pickle, no connection, and no file
written outside the trial's own folder. An audit hook of Python's watches; trials run in forked processes, so that a
crash is seen and costs only itself. A trial is known by its kind and number, and can be repeated alone:
`python benchmarks/fuzz.py --only checkpoints:4711 SEED`.
"""

import contextlib
import copy
import faulthandler
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

# A child has none of the threads that its parent computed with, and would wait for them.
os.environ["OMP_NUM_THREADS"] = "1"

BATCH = 100  # trials of a forked process
SECONDS = 60  # of the longest trial
LONGEST_LINE = 1500

# fmt: off
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**40, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"),
    float("-inf"), "", " ", "\0", "\n", "null", "nan", "1e-3", "0x10", "no", "..", "/", "../../../etc/passwd",
    "/dev/zero", "~root", "a" * 300, "x" * 10_000, "\u202e", "\ud800", "ü", "=cmd|' /C calc'!A0", "os.system",
    "__class__", "__import__('os').system('touch canary')", "!!python/object/apply:os.system [touch canary]",
    "$(touch canary)", "`touch canary`", "; touch canary", "| touch canary", "pipe:touch canary",
    "file:///etc/passwd", "http://127.0.0.1:9/x", "hf-hub:evil/model", "timm:hf-hub:evil/model", "torch.hub.load",
    "evil.py", "%s%n", "{0}", "l1", "topk:k=0", "topk:k=-1", "ghost:base=(ghost:base=(l1))", "((((", "))))",
    "lp:p=nan", "batch:statistic=l1", [], {}, [[]], [None], {"a": {}}, [1, "a", None], {"__class__": "x"},
    {"_target_": "os.system"}, {"": ""}, [[[[[[[[]]]]]]]], list(range(50)), {str(n): n for n in range(30)},
)
"""Values that some code somewhere takes badly."""

PLAUSIBLE: tuple[Any, ...] = (
    1, 2, 3, 8, 16, 0.1, 0.5, True, False, None, "auto", "cpu", "none", "all", "default", "resnet8", "mnist", "digits",
    "l1", "linf", "topk:k=3", "layer", "bounded", "cosine", "constant", "skip", "linear", "float32", "1ep", "5st",
    "50%", "SGD", "Adam", "AdamW", "timm:resnet18", "torchvision:resnet18", "imagefolder:.", "webdataset:.", "hf:a/b",
    "x.py", [1, 2], {"width": 4}, {"depth": 8}, ["batch"], {"epoch": 1}, [{"epoch": 0, "optimizer": "SGD", "lr": 0.1}],
)
"""Values that some setting takes."""
# fmt: on


@dataclass
class Finding:
    """A trial that did not end as it must."""

    trial: str
    problem: str


@dataclass
class Tally:
    """What became of the trials of a kind."""

    trials: int = 0
    taken: int = 0
    refused: int = 0
    findings: list[Finding] = field(default_factory=list)


Trial = Callable[[random.Random, Path], None]
"""Mutates and reads one file in a folder of its own."""


# ------------------------------------------------------------------------------------------------ mutations


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, left out, repeated, or put in."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        place = rng.randrange(len(found) + 1)
        kind = rng.randrange(7)
        if kind == 0 and found:
            found[place % len(found)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[place:]
        elif kind == 2:
            del found[place : place + rng.choice((1, 4, 64))]
        elif kind == 3:
            found[place:place] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 4:
            found[place:place] = found[place : place + rng.choice((1, 16, 512))]
        elif kind == 5:
            found[place : place + 4] = rng.choice((b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
        else:
            found[place : place + 8] = rng.choice((b"99999999", b"-1", b"NaN", b"{{{{", b"[[[[", b'""""', b"\xc3\x28"))
    return bytes(found)


def mutate_tree(rng: random.Random, value: Any) -> Any:
    """The value with a hostile one somewhere in it, an entry less, or one more."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        node, path = value, []
        while isinstance(node, (dict, list)) and node and (not path or rng.random() < 0.8):
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            path.append((node, key))
            node = node[key]
        if not path:
            return rng.choice(HOSTILE)
        owner, key = path[-1]
        kind = rng.randrange(8)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[str(rng.choice(HOSTILE))] = owner[key]
        elif kind == 2 and isinstance(owner, dict):
            owner[rng.choice(("__class__", "_target_", "extra", "", "a.b", "name"))] = rng.choice(HOSTILE)
        elif kind == 3 and isinstance(owner, list):
            owner.extend(owner[:1000])
        else:
            owner[key] = copy.deepcopy(rng.choice(rng.choice((HOSTILE, PLAUSIBLE))))
    return value


# ------------------------------------------------------------------------------------------------ what is read


class Checkpoints:
    """A small run, mutated below and above its checksums, then loaded, and trained for a step."""

    def __init__(self, place: Path) -> None:
        from norm_matters.core.config import load_config
        from norm_matters.plan import prepare
        from norm_matters.run import CHECKS, train

        phases = "regime.phases=[{epoch: 0, optimizer: Adam, lr: 0.001}]"
        settings = [phases, "train.epochs=1", "data.batch_size=512", "device=cpu", "model.options.width=2"]
        config = load_config(
            overrides=[*settings, f"output={place}", "name=run", "train.instruments=none"], checks=CHECKS
        )
        with contextlib.redirect_stdout(io.StringIO()):
            run = train(config).folder
        self.folder = (run / "checkpoints" / "last").resolve()
        self.document = json.loads((self.folder / "state.json").read_text())
        self.version = self.document.pop("format_version")
        del self.document["sha256"]
        self.parts = {name: (self.folder / name).read_bytes() for name in self.document["parts"]}
        self.plan = prepare(config)
        self.batch = next(iter(self.plan.train.epoch(0)))

    def __call__(self, rng: random.Random, work: Path) -> None:
        from norm_matters.core.errors import reading
        from norm_matters.engine.metrics import Meter
        from norm_matters.engine.step import train_step
        from norm_matters.inference import load_run
        from norm_matters.plan import step_options
        from norm_matters.record import load_checkpoint
        from norm_matters.resuming import _check_saved, load_state

        folder = work / self.folder.name
        folder.mkdir()
        self._write(rng, folder)
        checkpoint = load_checkpoint(folder)
        if rng.random() < 0.5:
            loaded = load_run(folder, device="cpu")
            loaded.logits(self.batch.images[:2, : loaded.preprocessing.channels])
            return
        with reading(str(folder)):
            _check_saved(checkpoint.state)
        load_state(self.plan, folder, checkpoint.model, checkpoint.training, checkpoint.state["training"])
        meter = Meter(self.plan.state.device)
        options = step_options(self.plan.config.train)
        train_step(self.plan.state, self.batch.images, self.batch.labels, options=options, meter=meter)

    def _write(self, rng: random.Random, folder: Path) -> None:
        from norm_matters.record.state import seal_state

        document, parts = copy.deepcopy(self.document), dict(self.parts)
        kind, name = rng.randrange(6), rng.choice(list(parts))
        if kind == 0:  # below the checksums
            whole = {**parts, "state.json": seal_state(document)}
            name = rng.choice(list(whole))
            whole[name] = mutate_bytes(rng, whole[name])
            for file, data in whole.items():
                (folder / file).write_bytes(data)
            return
        if kind == 1:
            document["state"] = mutate_tree(rng, document["state"])
        elif kind == 2:
            document = mutate_tree(rng, document)
        elif kind == 3:
            parts[name] = mutate_header(rng, parts[name])
        elif kind == 4:
            parts[name] = mutate_bytes(rng, parts[name])
        else:
            parts[name] = rng.choice(
                (b"", parts[name][:100], *parts.values(), b"PK\x03\x04", b"\x80\x04cos\nsystem\n.")
            )
        for file, data in parts.items():
            (folder / file).write_bytes(data)
            if isinstance(document, dict) and isinstance(document.get("parts"), dict) and file in document["parts"]:
                entry = document["parts"][file]
                if isinstance(entry, dict) and kind > 2:
                    entry |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        document = document if isinstance(document, dict) else {"value": document}
        with contextlib.suppress(UnicodeEncodeError):
            (folder / "state.json").write_bytes(seal_state({"step": 1, **document}))


def mutate_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(mutate_tree(rng, header)).encode()
    size = len(text) if rng.random() < 0.95 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    return size.to_bytes(8, "little") + text + data[8 + length :]


class Configs:
    """A configuration of every setting, mutated as text and as a tree, with overrides; what is valid is built."""

    def __init__(self, place: Path) -> None:
        from norm_matters.core.config import RunConfig, flatten, load_config
        from norm_matters.core.yaml import write_yaml

        full = load_config(options={"model.norm": "topk:k=3", "model.options": {"width": 4}, "name": "run"})
        phases = load_config(
            options={"regime.phases": [{"epoch": 0, "optimizer": "SGD", "lr": 0.1}, {"step": "10%", "lr": "cosine"}]},
        )
        self.trees = [full.model_dump(), phases.model_dump(), {"model": {"norm": "l1"}, "seed": 3}]
        self.texts = [write_yaml(tree) for tree in self.trees]
        self.keys = list(flatten(RunConfig()))

    def __call__(self, rng: random.Random, work: Path) -> None:
        from norm_matters.core.config import dump_config, load_config
        from norm_matters.core.yaml import write_yaml
        from norm_matters.plan import CHECKS, complete

        file = work / "config.yaml"
        kind = rng.randrange(3)
        if kind == 0:
            file.write_bytes(mutate_bytes(rng, rng.choice(self.texts).encode()))
        elif kind == 1:
            lines = rng.choice(self.texts).splitlines()
            place = rng.randrange(len(lines))
            lines[place] = lines[place].partition(":")[0] + ": " + str(rng.choice(rng.choice((HOSTILE, PLAUSIBLE))))
            file.write_text("\n".join(lines), errors="surrogatepass")
        else:
            tree = mutate_tree(rng, rng.choice(self.trees))
            try:
                file.write_text(write_yaml(tree), errors="surrogatepass")
            except ValueError:
                file.write_text(repr(tree), errors="surrogatepass")
        overrides = [
            f"{rng.choice(self.keys if rng.random() < 0.9 else HOSTILE)}={rng.choice(rng.choice((HOSTILE, PLAUSIBLE)))}"
            for _ in range(rng.choice((0, 0, 0, 1, 2)))
        ]
        config = load_config(file, {}, overrides, CHECKS)
        assert load_config(overrides=[]) is not None
        file.write_text(dump_config(config))
        assert load_config(file) == config, "config.yaml is read back otherwise"
        complete(config, epochs=1)
        self._build(config)

    def _build(self, config: Any) -> None:
        """Build a small one."""
        from norm_matters.plan import prepare

        model, data = config.model, config.data
        small = model.name in ("resnet8", "mnist") and data.name == "digits" and (data.input_size or 8) <= 32
        if small and not config.train.compile and not config.train.cuda_graphs and config.device == "auto":
            prepare(config.model_copy(update={"deterministic": False}))


class Words:
    """Specs of norms and weight norms, settings of the command line and of sweeps, regimes and lengths of time."""

    def __init__(self, place: Path) -> None:
        self.specs = (
            "l1",
            "topk:k=10",
            "lp:p=3",
            "group:groups=8,statistic=l1",
            "ghost:size=32,base=(topk:k=10)",
            "timm:frn",
        )
        self.grids = (
            {"base": {"model": {"name": "resnet8"}}, "grid": {"norm": ["l2", "l1"], "seed": ["0..4"]}},
            {
                "grid": {"arms": [{"norm": "l1", "lr": 0.1}, {"norm": "l2"}]},
                "exclude": [{"norm": "l1"}],
                "include": [{"seed": 9}],
            },
        )
        self.phases = [
            {"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9},
            {"epoch": "50%", "lr": {"cosine": 0.0}},
        ]

    def __call__(self, rng: random.Random, work: Path) -> None:
        from norm_matters.core.clock import Duration
        from norm_matters.core.config import RegimeConfig
        from norm_matters.core.errors import UserError
        from norm_matters.core.yaml import write_yaml
        from norm_matters.experiments.cells import make_cells
        from norm_matters.experiments.grid import override, read_grid, read_setting
        from norm_matters.norms import canonical_spec, create_norm
        from norm_matters.plan import CHECKS, complete
        from norm_matters.regimes import build_regime
        from norm_matters.weights import canonical_weight_norm

        kind = rng.randrange(5)
        text = mutate_bytes(rng, rng.choice(self.specs).encode()).decode(errors="replace")
        if kind == 0:
            canonical = canonical_spec(text)
            assert canonical_spec(canonical) == canonical
            create_norm(canonical, 8)
        elif kind == 1:
            canonical_weight_norm(mutate_bytes(rng, b"bounded:p=1").decode(errors="replace"))
        elif kind == 2:
            file = work / "grid.yaml"
            grid = mutate_tree(rng, rng.choice(self.grids))
            try:
                file.write_text(write_yaml(grid), errors="surrogatepass")
            except ValueError:
                file.write_text(repr(grid), errors="surrogatepass")
            found = read_grid(file)
            given = dict([read_setting(f"{rng.choice(('norm', 'seed', 'lr'))}={text}")])
            if sum(len(points) for points in found.axes.values()) < 100:
                make_cells(override(found, given), complete=lambda config: complete(config, epochs=1), checks=CHECKS)
        elif kind == 3:
            phases = mutate_tree(rng, self.phases)
            try:
                config = RegimeConfig(phases=phases)
            except ValueError as error:
                raise UserError("pydantic refuses it") from error
            build_regime(config, default="constant")
        else:
            try:
                Duration.parse(mutate_bytes(rng, b"30ep").decode(errors="replace"))
            except ValueError as error:
                raise UserError("no duration") from error


IMAGES = ("JPEG RGB", "PNG RGB", "PNG P", "GIF P", "BMP RGB", "TIFF RGB", "WEBP RGB", "PPM RGB")


def _image(pixels: Any, kind: str, mode: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


class Data:
    """Tables of runs, tar archives, parquet, idx and image files, manifests."""

    def __init__(self, place: Path) -> None:
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        draw = np.random.default_rng(0)
        pixels = draw.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        self.images = [_image(pixels, *kind.split()) for kind in IMAGES]
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for number in range(6):
                label = b"%d" % (number % 2)
                texts = {"jpg": self.images[0], "cls": label, "json": b'{"label": %s}' % label}
                for ending, content in texts.items():
                    name = f"{number}.{ending}"
                    member = tarfile.TarInfo(name if number else f"{'long/' * 30}{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        self.tar = buffer.getvalue()
        buffer = io.BytesIO()
        column = [{"bytes": image, "path": None} for image in self.images]
        table = pa.table({"image": column * 2, "label": [0, 1] * len(column)})
        pq.write_table(table, buffer, row_group_size=5)
        self.parquet = buffer.getvalue()
        self.idx = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (10, 4, 4)) + bytes(range(160))
        self.csv = b"epoch,step,train_loss,val_loss,lr\n1,10,2.5,2.25,0.1\n2,20,1.5,,0.1\n"
        self.trace = (
            b"step,loss,weight_norm,weights_blake2b\n"
            + b"1,2.5,3.5,"
            + b"ab" * 32
            + b"\n2,2.25,3.5,"
            + b"cd" * 32
            + b"\n"
        )
        self.layout = b'{"format": 1, "columns": [{"instrument": "sigma", "layer": "bn1", "size": 2}]}'
        self.values = np.arange(6, dtype="<f4").tobytes()
        shard = {"name": "train-0.tar", "images": 6, "bytes": len(self.tar), "sha256": "ab" * 32}
        self.manifest = {
            "norm_matters": 1,
            "format": "webdataset",
            "classes": ["cat", "dog"],
            "parts": {"train": {"images": 6, "shards": [shard]}},
            "index_sha256": "ab" * 32,
            **{key: [] for key in ("skipped", "command")},
            "plan": {},
        }

    def __call__(self, rng: random.Random, work: Path) -> None:
        from norm_matters.core.config import DataConfig
        from norm_matters.datasets.idx import read_idx
        from norm_matters.datasets.images import decode_image
        from norm_matters.datasets.manifest import MANIFEST, packed_classes, read_manifest
        from norm_matters.datasets.parquet import read_parquet
        from norm_matters.datasets.tars import scan_tar
        from norm_matters.datasets.webdataset import read_webdataset
        from norm_matters.record.instruments import read_measurements
        from norm_matters.record.table import read_table
        from norm_matters.record.trace import read_trace

        file, kind = work / "file", rng.randrange(9)
        if kind == 0:
            file.write_bytes(mutate_bytes(rng, self.tar))
            scan_tar(file)
        elif kind == 1:
            (work / "train-0.tar").write_bytes(mutate_bytes(rng, self.tar) if rng.random() < 0.5 else self.tar)
            (work / MANIFEST).write_text(json.dumps(mutate_tree(rng, self.manifest)))
            packed_classes(work)
            read_manifest(work)
            source = read_webdataset(DataConfig(name="webdataset:x", dir=str(work)), ".")
            for index in range(min(3, len(source.train))):
                source.train.image(index)
        elif kind == 2:
            (work / "train.parquet").write_bytes(mutate_bytes(rng, self.parquet))
            source = read_parquet(DataConfig(name="parquet:x", dir=str(work)), ".", decode=rng.random() < 0.5)
            source.train.image(0)
        elif kind == 3:
            file.write_bytes(mutate_bytes(rng, self.idx))
            read_idx(file)
        elif kind in (4, 5):
            decode_image(mutate_bytes(rng, rng.choice(self.images)), rng.choice((1, 3)), name="image")
        elif kind == 6:
            file.write_bytes(mutate_bytes(rng, self.csv))
            read_table(file)
        elif kind == 7:
            (work / "trace.csv").write_bytes(mutate_bytes(rng, self.trace))
            read_trace(work)
        else:
            (work / "instruments.json").write_bytes(mutate_bytes(rng, self.layout))
            (work / "instruments.f32").write_bytes(
                mutate_bytes(rng, self.values) if rng.random() < 0.5 else self.values
            )
            read_measurements(work)


KINDS: dict[str, Callable[[Path], Trial]] = {
    "checkpoints": Checkpoints,
    "configs": Configs,
    "words": Words,
    "data": Data,
}


# ------------------------------------------------------------------------------------------------ the watch


class Watch:
    """Notes what a trial must not do, as Python's audit events tell it."""

    FORBIDDEN: Final = {
        *("os.system", "os.exec", "os.posix_spawn", "os.kill", "subprocess.Popen"),
        *("socket.connect", "socket.bind", "pickle.find_class"),
    }
    WRITING: Final = {
        *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"),
        "shutil.rmtree",
    }

    def __init__(self) -> None:
        self.allowed: list[str] = []
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self.FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.100}")
        elif (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            self._written(event, arguments[0])
        elif event in self.WRITING:
            for path in arguments[:2]:
                self._written(event, path)

    def _written(self, event: str, path: Any) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            place = os.path.abspath(os.fsdecode(path))
            if not any(place == home or place.startswith(f"{home}/") for home in self.allowed):
                self.seen.append(f"{event} {place}")


def run_batch(
    name: str, trial: Trial, numbers: range, seed: int, place: Path, report: Callable[[str, str], None]
) -> None:
    """Run trials in this process; `report` gets the outcome of each: taken, refused, or what was wrong."""
    from norm_matters.core.errors import UserError

    watch = Watch()
    cache = place / "home"
    watch.allowed = [str(cache), "/dev/null"]
    signal.signal(signal.SIGALRM, _too_long)
    for number in numbers:
        label, work = f"{name}:{number}", place / "work" / str(number)
        report("begin", label)
        work.mkdir(parents=True)
        before = sorted(
            path for path in place.rglob("*") if work not in (path, *path.parents) and cache not in path.parents
        )
        rng = random.Random(f"{seed} {label}")
        watch.seen, watch.on = [], True
        watch.allowed[2:] = [str(work)]
        signal.alarm(SECONDS)
        outcome = "taken"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trial(rng, work)
        except UserError as error:
            lines = [line for problem in error.problems for line in problem.splitlines()] or [""]
            long = max(map(len, lines)) > LONGEST_LINE or len(lines) > 60
            outcome = f"a message of {len(lines)} lines, {max(map(len, lines))} characters" if long else "refused"
        except BaseException as error:
            place_of = traceback.extract_tb(error.__traceback__)[-1]
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "norm_matters" in frame.filename]
            own = frames[-1] if frames else place_of
            outcome = f"{type(error).__name__}: {str(error)[:200]!r} ({own.filename.rpartition('/')[2]}:{own.lineno})"
        finally:
            signal.alarm(0)
            watch.on = False
        if watch.seen:
            outcome = f"did {watch.seen[:3]}"
        shutil.rmtree(work, ignore_errors=True)
        after = sorted(
            path for path in place.rglob("*") if work not in (path, *path.parents) and cache not in path.parents
        )
        if after != before:
            outcome = f"left {sorted(set(after) ^ set(before))[:3]}"
        report(outcome, label)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no end after {SECONDS} seconds")


def run_kind(name: str, count: int, seed: int, *, numbers: range | None = None, batch: int = BATCH) -> Tally:
    """All trials of a kind, in forked processes of `batch` trials."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="norm-matters-fuzz-") as folder:
        place = Path(folder).resolve()
        (place / "home").mkdir()
        before = {key: os.environ.get(key) for key in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "TMPDIR")}
        for key in before:
            os.environ[key] = str(place / "home")
        cwd = os.getcwd()
        os.chdir(place)
        try:
            _warm_up()
            trial = KINDS[name](place / "home")
            (place / "work").mkdir()
            wanted = numbers or range(count)
            for start in range(0, len(wanted), batch):
                _in_child(name, trial, wanted[start : start + batch], seed, place, tally)
        finally:
            os.chdir(cwd)
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
    return tally


def _warm_up() -> None:
    """Import here what trials import, so that it is not their doing."""
    import norm_matters.core.torchvision  # noqa: F401
    from norm_matters.experiments import cells, grid  # noqa: F401
    from norm_matters.norms import create_norm

    for spec in ("l1", "timm:frn", "ghost:size=4,base=(topk:k=2)"):
        with contextlib.suppress(Exception):
            create_norm(spec, 8)


def _in_child(name: str, trial: Trial, numbers: range, seed: int, place: Path, tally: Tally) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        faulthandler.disable()
        with open(writer, "w", buffering=1) as stream:
            run_batch(
                name,
                trial,
                numbers,
                seed,
                place,
                lambda outcome, label: print(json.dumps([outcome, label]), file=stream),
            )
        os._exit(0)
    os.close(writer)
    last, ended = "", True
    with open(reader) as stream:
        for line in stream:
            outcome, label = json.loads(line)
            if outcome == "begin":
                last, ended = label, False
                continue
            ended = True
            tally.trials += 1
            tally.taken += outcome == "taken"
            tally.refused += outcome == "refused"
            if outcome not in ("taken", "refused"):
                tally.findings.append(Finding(label, outcome))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status or not ended:
        tally.trials += 1
        tally.findings.append(Finding(last, f"the process ended with status {status}"))
        shutil.rmtree(place / "work", ignore_errors=True)
        (place / "work").mkdir()
        rest = range(int(last.partition(":")[2]) + 1, numbers.stop)
        if rest:
            _in_child(name, trial, rest, seed, place, tally)


def main(arguments: list[str]) -> int:
    """Run what is asked for and print what became of it; 1 where anything was found."""
    if arguments[:1] == ["--only"]:
        name, _, number = arguments[1].partition(":")
        wanted, count, seed = [name], 1, int(arguments[2])
        numbers = range(int(number), int(number) + 1)
    else:
        count, seed, wanted, numbers = int(arguments[0]), int(arguments[1]), arguments[2:] or list(KINDS), None
    found = 0
    for name in wanted:
        start = time.monotonic()
        tally = run_kind(name, count, seed, numbers=numbers)
        found += len(tally.findings)
        seconds = time.monotonic() - start
        outcome = f"{tally.taken} taken, {tally.refused} refused, {len(tally.findings)} findings"
        print(f"{name}: {tally.trials} trials, {outcome}, {seconds:.0f} s")
        for problem, times in Counter(finding.problem for finding in tally.findings).most_common(40):
            example = next(finding.trial for finding in tally.findings if finding.problem == problem)
            print(f"  {times} x {problem}  (such as {example})")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
