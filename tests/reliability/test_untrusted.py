"""Files from strangers

They execute nothing, reach nothing, and take no memory they do not bring along.

What others may send you, a saved network, a run folder, a file of options, is damaged and forged case by case: bytes
flipped and cut, every entry of config.json replaced by huge, negative and infinite numbers, by words, paths and nested
lists; headers of safetensors that claim terabytes, pickles where weights should be, links to devices, YAML that unfolds
a billionfold. `ofb.load`, timm's way to the folder, `ofb report`, `ofb profile` and `ofb search` read them, with the
network forbidden and at most 4 GiB of memory more than they started with. What comes out is a network that works, or
one line that says what is wrong.

Two limits: where timm reads config.json, it refuses in its own words what is wrong outside of the `network` entry; and
weights of the right shapes may hold any numbers.

A report shows a stranger's words as words. From the hub come config.json and model.safetensors, and nothing else.

Found and fixed: a few megabytes of weights that took 20 GB to load (a wide stream with narrow blocks), a description
that named a device and so took its memory before any check, options that reached timm's loader, pickles that timm falls
back to on the hub, YAML that unfolds, formulas and HTML in names.
"""

import ast
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.reliability.conftest import NIGHT
from tests.reliability.hostile import CANARY
from tests.reliability.test_no_network import ROOT, watched

SOURCES = [
    path for folder in ("ofb", "ofb_kernels", "benchmarks", "examples") for path in ROOT.glob(f"{folder}/**/*.py")
]
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load",
    "marshal.loads", "shelve.open", "dill.load", "dill.loads", "joblib.load", "pandas.read_pickle", "yaml.load",
    "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "os.system", "os.popen", "shutil.unpack_archive",
    "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter",
}  # fmt: skip
FORBIDDEN_METHODS = {"extractall", "extract_all"}
# Arguments that make a call unsafe, and those without which it is.
UNSAFE = {("allow_pickle", True), ("shell", True), ("trust_remote_code", True), ("weights_only", False)}
NEEDED = {"torch.load": ("weights_only", True)}
HUB = """
import json, os, pickle
from pathlib import Path
from tests.hub_server import hub

with hub() as (address, files):
    os.environ["HF_ENDPOINT"] = address
    import timm
    import ofb
    from tests.common import tiny_vit
    from tests.reliability.hostile import NAMED_CONFIGS, Executes

    ofb.save(tiny_vit(depth=1), "network")
    config, weights = (Path("network", name).read_bytes() for name in ("config.json", "model.safetensors"))
    ofb.save(tiny_vit(depth=1, num_classes=6), "other")
    repositories = {
        "as it was saved": {"model.safetensors": weights},
        "other weights": {"model.safetensors": Path("other", "model.safetensors").read_bytes()},
        "a pickle": {"pytorch_model.bin": pickle.dumps(Executes())},
    }
    for name in ("a width of 10**9", "10**5 blocks"):
        changed = NAMED_CONFIGS[name](config.decode()).encode()
        repositories[name] = {"config.json": changed, "model.safetensors": weights}
    answers = {}
    for name, content in repositories.items():
        files.clear()
        files |= {"config.json": config} | content
        try:
            timm.create_model(f"hf-hub:someone/{name.replace(' ', '-').replace('*', '')}", pretrained=True)
            answers[name] = "loaded"
        except ValueError as error:
            answers[name] = str(error)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def attack(folder) -> tuple[dict, list[dict]]:
    """What became of the hostile files, and what the processes that read them did."""
    cases, seconds = (2000, 3600) if NIGHT in os.environ else (50, 600)
    done, notes = watched(f"from tests.reliability.hostile import main; main({cases})", folder, timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), notes


def test_hostile_files_are_refused_in_one_line_or_work(attack, evidence):
    counts = attack[0]["counts"]
    assert attack[0]["wrong"] == []
    assert counts["valid"] > 20 < counts["refused"]
    evidence("hostile files refused", counts["refused"])
    evidence("damaged files that still made a network that works, or a report", counts["valid"])


def test_hostile_files_execute_and_reach_nothing(attack, folder):
    result, notes = attack
    assert result["executed"] == [] and not result["canary"]
    assert [note for note in notes if note["kind"] == "network"] == []
    written = {note["what"] for note in notes if note["kind"] == "write"}
    assert {path for path in written if not path.startswith(str(folder))} <= {"/dev/null"}


def test_words_of_a_report_stay_words(attack):
    ours, theirs = map(Tags, attack[0]["pages"])
    assert theirs.found == ours.found
    assert theirs.evil > 50, "the words do not reach the page"


def test_no_call_that_executes_files(evidence):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}" for path in SOURCES for line, what in unsafe_calls(path.read_text())
    ]
    assert found == []
    evidence("source files without a call that could execute a file", len(SOURCES))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.load(file)",
        "from pickle import loads as read\nread(data)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "eval(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "archive.extractall(folder)",
    ],
)
def test_unsafe_calls_are_seen(code):
    assert len(unsafe_calls(code)) == 1


def unsafe_calls(code: str) -> list[tuple[int, str]]:
    """Line and name of each call that could execute what stands in a file."""
    tree, names, found = ast.parse(code), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.asname or each.name: each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, _, rest = ast.unparse(call.func).partition(".")
        name = f"{names.get(first, first)}{'.' + rest if rest else ''}"
        given = {(each.arg, each.value.value) for each in call.keywords if isinstance(each.value, ast.Constant)}
        forbidden = name in FORBIDDEN or name.rpartition(".")[2] in FORBIDDEN_METHODS
        if forbidden or given & UNSAFE or (name in NEEDED and NEEDED[name] not in given):
            found.append((call.lineno, name))
    return found


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes, and how often it has evil words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[tuple] = set()
        self.evil = 0
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.evil += data.count("<script>")

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.add((tag, *sorted(name for name, _ in attributes)))


def test_hub(tmp_path, evidence):
    """The client is the real one; the hub runs on this machine."""
    done = subprocess.run(
        [sys.executable, "-c", HUB],
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / CANARY).exists()
    answers = json.loads(done.stdout)
    assert answers.pop("as it was saved") == "loaded"
    expected = {
        "a width of 10**9": "network: expected sizes as ofb.save writes them",
        "other weights": "does not belong to its config.json",
        "a pickle": "someone/a-pickle: expected a model.safetensors, got none; nothing else is loaded",
        "10**5 blocks": "network: expected a description of at most",
    }
    assert answers.keys() == expected.keys()
    for name, message in expected.items():
        assert message in answers[name], name
    evidence("hostile repositories of a hub refused", len(answers))
