"""Files as an attacker would write them, and what becomes of them: `python -m tests.reliability.hostile CASES`, in a
folder of its own, prints JSON.

Real files are made first: a search's run folder and the networks of three families. Then each case damages a copy of
one and hands it to everything that reads such files.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import ofb
from ofb import cli
from ofb.supernet.families import build
from tests.common import tiny_swin, tiny_vit

MEMORY = 4 * 2**30  # bytes that a process may take beyond those it has once all is imported
SECONDS = 20  # of processor time, for one case
LARGEST_IMAGE = 1024  # pixels on a side that a network is given
REFUSED, VALID = "refused", "valid"
EXECUTION = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
CANARY = "executed"
EVIL = """ "'><script>alert(1)</script><img src=x onerror=alert(1)>{{$\\frac{$"""
MODEL = "--model vit_tiny_patch16_224 --model-kwargs embed_dim=32 depth=1 num_heads=2 --device cpu --batch-size 256"
SEARCH = "--checkpoint dense --device cpu --batch-size 256 --epochs 1 --finetune-epochs 1 --target 60%"
UNREACHABLE = "search --output never --device cpu --target 0.001%".split()  # so that no search begins
WORDS = ["", "abc", "hf-hub:someone/else", "../../etc/passwd", "/etc/passwd", "os.system", "cuda", "<script>", "\ud800"]
NUMBERS = [0, -1, 1, 2, 3, 7, 2**16, 10**6, 10**9, 10**12, 2**62, 2**63, 10**400, 0.5, -0.0, 1e-300, 1e300]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
OTHERS = [None, True, False, [], {}, [[]], [1, 2, 3], [10**9] * 2, {"a": 1}, [{}] * 5, ["x"] * 3]
DTYPES = ["F64", "F16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "PICKLE", ""]


class Executes:
    """Its pickle makes a file when it is read."""

    def __reduce__(self) -> tuple:
        return open, (str(Path(CANARY).absolute()), "w")


def families() -> dict[str, Callable[[], nn.Module]]:
    dinov3 = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 4, "num_classes": 5}
    siglip = {"embed_dim": 32, "depth": 1}
    return {
        "vit": lambda: tiny_vit(depth=1),
        "pooled": lambda: tiny_vit("vit_base_patch16_siglip_224", **siglip),
        "eva": lambda: timm.create_model("vit_small_patch16_dinov3", **dinov3),
        "swin": lambda: tiny_swin(depths=(1, 1)),
    }


# Damage


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Where something stands in nested dicts and lists."""
    yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


def changed(value: Any, chance: random.Random, below: tuple = ()) -> Any:
    """Nested dicts and lists with one place below `below` replaced, removed or doubled."""
    value = copy.deepcopy(value)
    *path, key = chance.choice([at for at in places(value) if len(at) > len(below) and at[: len(below)] == below])
    owner = value
    for each in path:
        owner = owner[each]
    action = chance.choice(["number", "number", "word", "other", "remove", "nest", "repeat"])
    if action == "remove":
        del owner[key]
    elif action == "repeat" and isinstance(owner, list):
        owner *= chance.choice([0, 2, 10**4])
    else:
        nested = {"a": copy.deepcopy(owner[key])}
        choices = {"number": NUMBERS, "word": WORDS, "other": OTHERS}.get(action, [nested, [nested], [owner[key]] * 2])
        owner[key] = chance.choice(choices)
    return value


def bytes_changed(data: bytes, chance: random.Random, within: int | None = None) -> bytes:
    """Bytes with some of the first `within` flipped, or cut off, or with more between them."""
    data, within = bytearray(data), min(within or len(data), len(data))
    at = chance.randrange(within)
    match chance.choice(["flip", "flip", "cut", "insert", "zeros"]):
        case "flip":
            for _ in range(chance.choice([1, 3, 30])):
                data[chance.randrange(within)] = chance.randrange(256)
        case "cut":
            del data[at:]
        case "insert":
            data[at:at] = chance.randbytes(chance.choice([1, 100]))
        case "zeros":
            data[at : at + 20] = bytes(20)
    return bytes(data)


def tensors_changed(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = chance.choice(sorted(header))
    match chance.choice(["length", "dtype", "name", "offsets", "shape", "json", "deep"]):
        case "length":
            return struct.pack("<Q", chance.choice([0, 1, 10**6, 2**40, 2**63, 2**64 - 1])) + data[8:]
        case "dtype":
            header[name]["dtype"] = chance.choice(DTYPES)
        case "name":
            header[chance.choice(["../../escaped", "/escaped", "a/b", "__metadata__", "\0"])] = header.pop(name)
        case "offsets":
            start, end = header[name]["data_offsets"]
            header[name]["data_offsets"] = chance.choice([[0, end], [start, 2**62], [end, start], [-1, 4], [0, 0]])
        case "shape":
            header[name]["shape"] = chance.choice([[2**62, 4], [], [0], [-1], [2**31] * 3, ["a"], [1] * 10**4])
        case "json":
            header = changed(header, chance)
        case "deep":
            text = b"[" * 10**5
            return struct.pack("<Q", len(text)) + text
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def config_changed(text: str, chance: random.Random, below: tuple = ()) -> str:
    config = json.loads(text)
    for _ in range(chance.choice([1, 1, 2, 4])):
        with contextlib.suppress(LookupError, TypeError):  # an earlier change took the place away
            config = changed(config, chance, below)
    return json.dumps(config)


# What must be refused, each with a reason of its own


def big(text: str, **sizes: int) -> str:
    config = json.loads(text)
    network = config["model_args"]["network"]
    for stage in network.get("stages", [network]):
        for name, size in sizes.items():
            if name in stage:
                stage[name] = size
            for block in stage["blocks"]:
                block |= {name: size} if name in block else {}
    return json.dumps(config)


def with_network(text: str, change: Callable[[dict], Any]) -> str:
    config = json.loads(text)
    change(config["model_args"]["network"])
    return json.dumps(config)


TIMM_ONLY = "10**5 brackets"  # what timm refuses with an error of its own
NAMED_CONFIGS: dict[str, Callable[[str], str]] = {
    "a width of 10**9": lambda text: big(text, embed_dim=10**9),
    "a width of 10**5": lambda text: big(text, embed_dim=10**5),
    "10**9 hidden units": lambda text: big(text, hidden=10**9),
    "images of 10**9 pixels": lambda text: with_network(text, lambda n: n.update(img_size=[10**9] * 2)),
    "images of 2**14 pixels": lambda text: with_network(text, lambda n: n.update(img_size=[2**14] * 2)),
    "10**5 blocks": lambda text: with_network(text, lambda n: n.get("stages", [n])[0].update(blocks=[{}] * 10**5)),
    "10**9 classes": lambda text: text.replace('"network"', '"num_classes": 1000000000, "network"', 1),
    "a rope of its own device": lambda text: with_network(
        text, lambda n: n.update(rope={"kind": "cat", "dim": 8, "feat_shape": [10**5] * 2, "device": "cpu"})
    ),
    "a deviation of 400 digits": lambda text: text.replace('"std": [', f'"std": [{10**400},', 1),
    TIMM_ONLY: lambda text: "[" * 10**5,
    "a number of 10**5 digits": lambda text: text.replace("{", '{"a": ' + "9" * 10**5 + ",", 1),
    "not JSON": lambda text: "import os; os.system('touch executed')",
    "nothing": lambda text: "",
}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n" for last, name in zip("abcdefghi", "bcdefghij", strict=True)
)
NAMED_YAML = {
    "a billion laughs": BOMB,
    "a list that holds itself": "model: &a [*a]\n",
    "an object": f"model: !!python/object/apply:os.mkdir [{CANARY}]\n",
    "a module": "model: !!python/module:os\n",
    "10**5 brackets": "model: " + "[" * 10**5,
    "a day that is none": "model: 2026-99-99\n",
    "a number of 10**5 digits": "epochs: " + "9" * 10**5 + "\n",
    "not text": "\0\1\2",
    "a number for a model": "target: 50%\nmodel: 3\n",
    "a word for a number": "target: 50%\nbatch_size: many\n",
    "a value of 10**5 signs": f"target: 50%\nmodel_kwargs: ['a={'-' * 10**5}1']\n",
    "a list": "- a\n",
    "keys that are lists": "? [a]\n: b\n",
}


class TooSlowError(BaseException):
    """Nobody catches it by mistake."""


class Trial:
    """Counts what became of the cases, and keeps what should not have."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def network(self, case: str, load: Callable[[], nn.Module], strict: bool = True) -> None:
        """A network comes out and works, or one line says why not; timm's own complaints pass where not `strict`."""

        def attempt() -> str:
            model = load().eval()
            size = model.patch_embed.img_size
            if max(size) <= LARGEST_IMAGE:
                with torch.no_grad():
                    assert len(model(torch.zeros(1, model.patch_embed.proj.in_channels, *size))) == 1
            return VALID

        self.judged(case, attempt, (ValueError, FileNotFoundError) if strict else (Exception,))

    def command(self, case: str, *args: str) -> None:
        """A command says in one line what is wrong, or works."""

        def attempt() -> str:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
                code = cli.main(args)
            lines = [line for line in errors.getvalue().splitlines() if line.startswith("ofb:")]
            if code == 0:
                return VALID
            return REFUSED if code == 2 and len(lines) == 1 else f"exit {code}: {errors.getvalue()[-500:]}"

        self.judged(case, attempt, ())

    def judged(self, case: str, attempt: Callable[[], str], refusals: tuple[type[Exception], ...]) -> None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            verdict = attempt()
        except refusals as error:
            verdict = REFUSED if len(str(error).splitlines()) <= 1 or refusals == (Exception,) else f"lines: {error}"
        except BaseException as error:
            verdict = f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.counts[verdict if verdict in (REFUSED, VALID) else "wrong"] += 1
        if verdict not in (REFUSED, VALID):
            self.wrong.append(f"{case}: {verdict}")


def attack_networks(trial: Trial, networks: dict[str, Path], cases: int) -> None:
    for family, folder in networks.items():
        text, weights = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()
        for name, change in NAMED_CONFIGS.items():
            strict = name != TIMM_ONLY
            _try_folder(trial, f"{family}, {name}", change(text), weights, strict)
            if family == "vit":
                trial.command(f"search --checkpoint, {name}", *UNREACHABLE, "--checkpoint", "hostile")
                _try_folder(trial, f"{family}, {name}, no weights", change(text), None, strict)
    for case in range(cases):
        chance = random.Random(case)
        family = chance.choice(sorted(networks))
        text = (networks[family] / "config.json").read_text()
        weights = (networks[family] / "model.safetensors").read_bytes()
        within = ("model_args", "network")
        strict = True
        match case % 6:
            case 0 | 1:
                text = config_changed(text, chance, within)
            case 2:
                text, strict = config_changed(text, chance), False
            case 3:
                text, strict = bytes_changed(text.encode(), chance).decode("latin-1"), False
            case 4:
                weights = tensors_changed(weights, chance)
            case 5:
                weights = bytes_changed(weights, chance, chance.choice([16, 2000, None]))
        _try_folder(trial, f"{family}, case {case}", text, weights, strict)


def _try_folder(trial: Trial, case: str, text: str, weights: bytes | None, strict: bool) -> None:
    """Both ways to a network, and without its weights the one that needs none."""
    folder = Path("hostile")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(text, errors="surrogatepass")
    if weights is None:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Executes()))
        trial.network(f"{case}, untrained", lambda: timm.create_model(f"local-dir:{folder}"), strict)
    else:
        (folder / "model.safetensors").write_bytes(weights)
        trial.network(f"{case}, ofb.load", lambda: ofb.load(folder))
    trial.network(f"{case}, timm", lambda: timm.create_model(f"local-dir:{folder}", pretrained=True), strict)


def attack_memory(trial: Trial, network: Path) -> None:
    """Weights of some megabytes that fit a stream so wide that blocks as wide as it is would take 20 GB."""
    folder = Path("wide")
    config = json.loads(big((network / "config.json").read_text(), embed_dim=20_000, heads=1, head_dim=1, hidden=1))
    ofb.save(build(config["model_args"]["network"]), folder)
    trial.network("a wide stream of narrow blocks", lambda: ofb.load(folder))


def attack_links(trial: Trial, network: Path) -> None:
    """Files that are something else: links to devices, to themselves, to nothing; pipes nobody writes to."""
    folder = Path("linked")
    for name in ("config.json", "model.safetensors"):
        for target in ("/dev/zero", name, "/etc", "/nowhere", None):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(network, folder)
            (folder / name).unlink()
            os.mkfifo(folder / name) if target is None else (folder / name).symlink_to(target)
            trial.network(f"{name} is {target}, ofb.load", lambda: ofb.load(folder))
            trial.network(
                f"{name} is {target}, timm", lambda: timm.create_model(f"local-dir:{folder}", pretrained=True)
            )


def attack_runs(trial: Trial, run: Path, cases: int) -> None:
    files = ["metrics.jsonl", "history.jsonl", "found.json", "figures.json", "importance.json", "config.yaml"]
    for name, text in NAMED_YAML.items():
        _try_run(trial, name, run, {"config.yaml": text})
        Path("options.yaml").write_text(text)
        trial.command(f"search --config, {name}", "search", "--config", "options.yaml", "--output", "never")
    for case in range(cases):
        chance = random.Random(case)
        name = chance.choice(files)
        text = (run / name).read_text()
        if chance.random() < 0.2:
            damaged = bytes_changed(text.encode(), chance).decode("latin-1")
        elif name.endswith("l") and name != "config.yaml":
            lines = text.splitlines()
            at = chance.randrange(len(lines))
            damaged = "\n".join([*lines[:at], json.dumps(changed(json.loads(lines[at]), chance)), *lines[at + 1 :]])
        elif name == "config.yaml":
            import yaml

            damaged = json.dumps(changed(yaml.safe_load(text), chance))
        else:
            damaged = json.dumps(changed(json.loads(text), chance))
        _try_run(trial, f"{name}, case {case}", run, {name: damaged})


def _try_run(trial: Trial, case: str, run: Path, files: dict[str, str]) -> None:
    folder = Path("strange")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("tensorboard", "checkpoints", "report"))
    for name, text in files.items():
        (folder / name).write_text(text, errors="surrogatepass")
    trial.command(f"report, {case}", "report", str(folder))
    if "config.yaml" in files:
        trial.command(f"profile, {case}", "profile", str(folder), "--device", "cpu")


# Words of a stranger's in a report


def poisoned(value: Any, keys: int = 0) -> Any:
    """Each word made evil, and each name in the first `keys` levels."""
    if isinstance(value, dict):
        return {key + EVIL if keys > 0 else key: poisoned(each, keys - 1) for key, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each, keys) for each in value]
    return value + EVIL if isinstance(value, str) else value


def poison(run: Path) -> Path:
    """A run folder whose words, and its own name, are evil, as far as a report is made of it."""
    folder = Path(EVIL.replace("/", "|"))
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("tensorboard", "checkpoints", "report"))
    names = {"figures.json": 1, "importance.json": 1}
    for path in [*folder.glob("*.json"), *folder.glob("*.jsonl")]:
        entries = [poisoned(json.loads(line), names.get(path.name, 0)) for line in _documents(path)]
        for entry in entries if path.name == "history.jsonl" else ():
            entry["costs"] = poisoned(entry["costs"], 1)
        if path.name == "found.json":
            entries[0]["networks"] = poisoned(json.loads(path.read_text())["networks"], 1)
        path.write_text("\n".join(map(json.dumps, entries)))
    import yaml

    options = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(json.dumps(poisoned(options, 1) | {"model": EVIL, "target": EVIL}))
    return folder


def _documents(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]


def too_slow(*_: object) -> None:
    raise TooSlowError


def run_all(cases: int) -> dict[str, Any]:
    assert cli.main(["train", *MODEL.split(), "--epochs", "1", "--output", "dense"]) == 0
    assert cli.main(["search", *SEARCH.split(), "--output", "found"]) == 0
    networks = {}
    for family, make in families().items():
        networks[family] = Path("networks") / family
        ofb.save(make(), networks[family])
        ofb.load(networks[family])
    assert cli.main(["profile", "found", "--device", "cpu"]) == 0
    strange = poison(Path("found"))
    assert cli.main(["report", str(strange)]) == 0
    pages = [(folder / "report" / "index.html").read_text() for folder in (Path("found"), strange)]
    events: list[str] = []
    sys.addaudithook(lambda event, arguments: events.append(f"{event}{arguments}") if event in EXECUTION else None)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    trial = Trial()
    attack_networks(trial, networks, cases)
    attack_memory(trial, networks["vit"])
    attack_links(trial, networks["vit"])
    attack_runs(trial, Path("found"), cases // 10)
    return {
        "pages": pages,
        "counts": trial.counts,
        "wrong": trial.wrong,
        "executed": events,
        "canary": Path(CANARY).exists(),
    }


def main(cases: int) -> None:
    signal.signal(signal.SIGPROF, too_slow)
    output, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(run_all(cases)), file=output)


if __name__ == "__main__":
    main(int(sys.argv[1]))
