"""What a run did: the table of its networks, its charts, and the page made of them."""

import dataclasses
import html
import json
import re
import shutil
from itertools import pairwise

import pytest
import torch
from torchvision.io import decode_image, read_file

import ofb
from ofb.cli import main
from ofb.engine.history import History
from ofb.engine.journal import Journal
from ofb.export import count_params
from ofb.network_latency import NetworkLatency, measure_network_latency
from ofb.report import comparison_table, figures, latencies_of, write_report
from ofb.report.chart import Band, Box, Chart, Line
from ofb.report.page import page
from ofb.report.png import save
from ofb.report.run import Run
from ofb.report.sections import sections
from ofb.report.svg import draw
from ofb.supernet.families import count_macs
from tests.common import tiny_swin, tiny_vit

MODEL = "--model vit_tiny_patch16_224 --model-kwargs embed_dim=32 depth=2 num_heads=2 --device cpu --batch-size 128"
SEARCH = "--epochs 4 --finetune-epochs 1 --mask-ratio-start 0.05 --mask-ratio-end 0.25 --lr 1e-3"
PARTS = {
    "networks", "architecture", "evolution", "accuracy", "losses", "candidates", "importance", "sparsity", "left-out",
    "reconstruction", "options",
}  # fmt: skip
PICTURES = PARTS - {"networks", "reconstruction", "options"}  # those made of charts


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of real runs: `search`, and `dense` training."""
    folder = tmp_path_factory.mktemp("runs")
    assert main([*f"train {MODEL} --epochs 2 --output".split(), str(folder / "dense")]) == 0
    assert main([*f"search {MODEL} {SEARCH} --output".split(), str(folder / "search")]) == 0
    return folder


def page_of(run) -> str:
    """The page without the pictures beside it, which take long to draw."""
    run = Run.read(run)
    return page(run, sections(run))


def copied(run, to, without=()):
    """A run as it was before these files were written."""
    return shutil.copytree(run, to, ignore=shutil.ignore_patterns("report", *without))


# ---- the table ----


def timed(ms: float, spread: float = 0.02, waiting: float = 0.0) -> dict:
    """What figures say of a latency."""
    low, high = ms * (1 - spread / 2), ms * (1 + spread / 2)
    timing = NetworkLatency(low=low, ms=ms, high=high, rounds=40, waiting=waiting, on="cpu, 2 threads, batch size 1")
    return {"latency_ms": ms, "latency": dataclasses.asdict(timing)}


def test_table():
    dense = {"top1": 98.0, "macs": 4_600_000_000, "params": 22_000_000, **timed(40.0)}
    compressed = {"top1": 97.25, "macs": 2_300_000_000, "params": 5_500, **timed(10.0)}
    lines = comparison_table({"dense": dense, "compressed": compressed}).splitlines()
    assert [cell for cell in lines[0].split("  ") if cell][-2:] == ["latency ms", "20 to 80 %"]
    assert "98.00" in lines[1] and lines[1].count("(100%)") == 3
    for cell in ("97.25", "2.3 G (50%)", "5.5 K (0%)", "10.00 (25%)", "9.90 to 10.10"):
        assert cell in lines[2]
    note = "latency: cpu, 2 threads, batch size 1; median and 20 to 80 % quantiles of 40 rounds in turns"
    assert " ".join(" ".join(lines[3:]).split()) == note


@pytest.mark.parametrize("columns", [80, 50, 20])
def test_a_table_keeps_to_the_terminal(columns, monkeypatch):
    """Columns that do not fit go on below, each network named again."""
    monkeypatch.setenv("COLUMNS", str(columns))
    network = {"top1": 98.0, "macs": 4_610_000_000, "params": 22_100_000, **timed(1040.0, spread=1.2)}
    table = comparison_table({"dense": network, "macs=50%": network})
    lines = table.partition("\nlatency: ")[0].splitlines()
    assert max(map(len, lines)) <= max(columns, len("macs=50%  1040.00 (unstable)"))
    names = [line.split()[0] for line in lines]
    assert names.count("dense") == names.count("macs=50%") == len(lines) // 3 > 1
    cells = ("98.00", "4.61 G (100%)", "22.1 M (100%)", "1040.00 (unstable)", "416.00 to 1664.00")
    assert all(table.count(cell) == 2 for cell in cells)


@pytest.mark.parametrize("noise", [{"spread": 1.2}, {"waiting": 0.5}])
@pytest.mark.parametrize("busy", ["dense", "compressed"])
def test_no_share_of_an_unstable_latency(busy, noise):
    """A share of what is unstable would be believed: "1.56 (344 %)"."""
    networks = {name: {"top1": 90.0, "macs": 10, "params": 10, **timed(2.0)} for name in ("dense", "compressed")}
    networks[busy] |= timed(2.0, **noise)
    table = comparison_table(networks)
    assert "2.00 (unstable)" in table.splitlines()[2]
    assert "\nunstable: quantiles lie up to " in table and "OMP_NUM_THREADS=1" in table
    assert ("120% of the median" in table) == ("spread" in noise) and ("waited 50%" in table) == ("waiting" in noise)
    on = networks["dense"]["latency"]["on"].replace("2 threads", "1 thread")
    for network in networks.values():
        network["latency"]["on"] = on
    assert "OMP_NUM_THREADS" not in comparison_table(networks), "one thread is the fewest"


def test_figures_of_networks():
    networks = {"large": tiny_vit(depth=3), "small": tiny_vit(depth=1)}
    found = figures(networks, {"large": {"top1": 2.0, "top5": 9.0}, "small": {"top1": 1.0, "top5": 9.0}})
    assert found["large"]["top1"] == 2.0 and found["small"]["top5"] == 9.0
    for name, network in networks.items():
        assert found[name]["macs"] == count_macs(network)
        assert found[name]["params"] == count_params(network)
    assert found["large"]["latency_ms"] > found["small"]["latency_ms"] > 0
    for network in found.values():
        latency = NetworkLatency(**json.loads(json.dumps(network["latency"])))
        assert latency.ms == network["latency_ms"] and latency.low <= latency.ms <= latency.high
        assert latency.rounds >= 15 and latency.on == f"cpu, {threads_in_words()}, batch size 1"


def threads_in_words() -> str:
    return "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"


def test_measuring_leaves_a_network_as_it_was():
    network = tiny_vit().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    measure_network_latency({"network": network}, batch_size=2)
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


# ---- charts ----


def test_a_chart_as_svg():
    """Marks lie where the axes say: y = 0 at the bottom, y = 1 at the top, and what comes from outside is escaped."""
    marks = [
        Line([0, 10], [0.0, 1.0], "blue", "<top-1>"),
        Band([0, 10], [0, 0], [1, 1], "#123456", opacity=0.5),
        Box(0, 0, 10, 1, "gray", "all & more", hollow=True),
    ]
    chart = Chart('"Title"', "A <summary>.", marks, "epoch", "y", y_range=(0, 1))
    svg = draw(chart)
    left, right, bottom, top = 46, 350, chart.height - 34, 22
    assert f'<polyline points="{left},{bottom} {right},{top}"' in svg
    assert f'points="{left},{top} {right},{top} {right},{bottom} {left},{bottom}"' in svg
    assert f'<rect x="{left}.0" y="{top}.0" width="{right - left}.0" height="{bottom - top}.0"' in svg
    assert "&lt;top-1&gt;" in svg and "all &amp; more" in svg and "&quot;Title&quot;. A &lt;summary&gt;." in svg
    assert "var(--blue)" in svg and "#123456" in svg
    assert [word for word in chart.x_axis[1].values()] == ["0", "2", "4", "6", "8", "10"]


def test_axes_of_flat_and_single_values():
    for y in ([0.0, 0.0], [5.0, 5.0], [-3.0, -3.0]):
        low, high = Chart("", "", [Line([1, 2], y, "blue")], "epoch", "y").y_axis[0]
        assert low < y[0] < high
    assert Chart("", "", [Line([1, 2], [1.0, 3.0], "blue")], "epoch", "y").y_axis[0] == pytest.approx((0.9, 3.1))
    assert Chart("", "", [Line([1, 2], [0.0, 2.0], "blue")], "epoch", "y").y_axis[0] == pytest.approx((0.0, 2.1))
    chart = Chart("", "", [Line([1], [2.0], "blue")], "epoch", "y")
    assert list(chart.x_axis[1].values()) == ["1"] and "NaN" not in draw(chart)


def test_every_chart_is_in_the_picture(tmp_path):
    charts = [Chart(f"chart {i}", "", [Line([1, 2], [0.0, 1.0], "blue")], "epoch", "y") for i in range(4)]
    save(tmp_path / "charts.png", charts)
    picture = decode_image(read_file(str(tmp_path / "charts.png")))[:3].float()
    height, width = picture.shape[1] // 2, picture.shape[2] // 3
    drawn = [
        [bool((picture[:, row * height :, column * width :][:, :height, :width] < 128).any()) for column in range(3)]
        for row in range(2)
    ]
    assert drawn == [[True, True, True], [True, False, False]]


# ---- the report of a run ----


def test_a_search_writes_its_report(runs):
    report = runs / "search" / "report"
    assert {path.name for path in report.iterdir()} == {"index.html", *(f"{part}.png" for part in PICTURES)}
    for part in PICTURES:
        picture = decode_image(read_file(str(report / f"{part}.png")))
        assert min(picture.shape[1:]) > 200 and picture.float().std() > 10, f"{part}.png is blank"
    shown = (report / "index.html").read_text()
    assert set(re.findall(r'<section id="([\w-]+)"', shown)) == PARTS


def test_its_figures_are_those_of_the_run(runs):
    shown = (runs / "search" / "report" / "index.html").read_text()
    found = json.loads((runs / "search" / "figures.json").read_text())
    for network in found.values():
        assert f"<td>{network['top1']:.2f}</td>" in shown
    compressed = ofb.load(runs / "search" / "export")
    assert found["compressed"]["macs"] == count_macs(compressed)
    for i, block in enumerate(compressed.blocks):
        heads, hidden = block.attn.num_heads, block.mlp.fc1.out_features
        size = f"{heads}×{block.attn.qkv.out_features // 3 // heads}"
        assert f'<th scope="row">attn{i}</th><td>2×16</td><td>{size}</td>' in shown
        assert f'<th scope="row">mlp{i}</th><td>128</td><td>{hidden}</td>' in shown
    last = json.loads((runs / "search" / "history.jsonl").read_text().splitlines()[-1])
    alive = sum(p is not None for each in last["submodules"].values() for row in each["probabilities"] for p in row)
    assert f"at the start, {alive} in the end, for 5 submodules" in shown


def test_its_latencies_are_those_of_the_table(runs, tmp_path):
    """One measurement for both; figures of an earlier version, which know no quantiles, are shown as they are."""
    run = copied(runs / "search", tmp_path / "run")
    compared = json.loads((run / "figures.json").read_text())
    for name, ms in (("dense", 40.0), ("compressed", 10.0)):
        compared[name] |= timed(ms)
    (run / "figures.json").write_text(json.dumps(compared))
    table, shown = comparison_table(compared), page_of(run)
    note = "latency: cpu, 2 threads, batch size 1; "
    for cell in ("40.00 (100%)", "10.00 (25%)", "39.60 to 40.40", "9.90 to 10.10", note):
        assert cell in table and html.escape(cell) in shown
    for network in compared.values():
        del network["latency"]
    (run / "figures.json").write_text(json.dumps(compared))
    assert latencies_of(compared) == {} and "10.00 (25%)" in page_of(run)


def test_the_best_epoch_is_named(runs, tmp_path):
    """The accuracies are written over: those of so short a search may all be chance."""
    metrics = copied(runs / "search", tmp_path / "run") / "metrics.jsonl"
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    for entry, top1 in zip(entries, [11.0, 14.0, 12.0, 13.0, 15.0], strict=True):
        entry["val_top1"] = top1
    metrics.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    charts = next(part for part in sections(Run.read(tmp_path / "run")) if part.name == "accuracy").all_charts
    for chart, best in zip(charts, ["14.00 % in epoch 2 of 4", "15.00 % in epoch 1 of 1"], strict=True):
        assert f"Best top-1 {best}." in chart.summary


def test_candidate_probabilities_add_up(runs):
    charts = next(part for part in sections(Run.read(runs / "search")) if part.name == "candidates").all_charts
    assert {chart.title.split(":")[0] for chart in charts} >= {"embed", "attn0", "mlp1"}
    for chart in charts:
        for i, _ in enumerate(chart.marks[0].x):
            assert sum(band.high[i] - band.low[i] for band in chart.marks) == pytest.approx(1, abs=2e-3)
        assert not any(chart.marks[0].low), "the first band stands on the axis, each other one on the one below"
        assert all(above.low == below.high for below, above in pairwise(chart.marks))


@pytest.mark.parametrize(
    ("without", "state", "missing"),
    [
        (["figures.json", "export"], "1 of 1 epochs of stage finetune are done", set()),
        (
            ["figures.json", "found.json", "importance.json"],
            "1 of 1 epochs of stage finetune are done",
            {"networks", "left-out"},
        ),
        (
            ["figures.json", "found.json", "importance.json", "history.jsonl", "metrics.jsonl", "reconstruction.png"],
            "no epoch is finished yet",
            PARTS - {"options"},
        ),
    ],
)
def test_an_interrupted_run(runs, tmp_path, without, state, missing):
    run = copied(runs / "search", tmp_path / "run", without)
    shown = page_of(run)
    assert set(re.findall(r'<section id="([\w-]+)"', shown)) == PARTS - missing
    assert f"<dd>{state}</dd>" in shown


def test_dense_training(runs, capsys):
    assert main(["report", str(runs / "dense")]) == 0
    path = runs / "dense" / "report" / "index.html"
    assert capsys.readouterr().out == f"{path}\n"
    shown = path.read_text()
    parts = {"networks", "architecture", "accuracy", "losses", "options"}
    assert set(re.findall(r'<section id="([\w-]+)"', shown)) == parts
    assert '<th scope="row">attn1</th><td>2×16</td>' in shown


def test_several_targets(runs, tmp_path):
    """As the run folder of such a search has it."""
    run = copied(runs / "search", tmp_path / "run")
    found, compared = (json.loads((run / name).read_text()) for name in ("found.json", "figures.json"))
    found["networks"] = {target: found["networks"]["50%"] for target in ("50%", "30%")}
    (run / "found.json").write_text(json.dumps(found))
    (run / "figures.json").write_text(
        json.dumps({"dense": compared["dense"], "50%": compared["compressed"], "30%": compared["compressed"]})
    )
    shown = page_of(run)
    for words in ("What is kept, target 50%", "What is kept, target 30%", '<th scope="col">30%</th>'):
        assert words in shown


def test_text_of_the_run_is_escaped(runs, tmp_path):
    attack = '"><script>alert(1)</script>'
    run = copied(runs / "search", tmp_path / "run <b>")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("data: digits", f"data: '{attack}'"))
    for name in ("metrics.jsonl", "history.jsonl", "found.json", "figures.json", "importance.json"):
        text = (run / name).read_text()
        for word in ("finetune", "50%", "compressed"):
            text = text.replace(f'"{word}"', json.dumps(word + attack))
        (run / name).write_text(text)
    shown = page_of(run)
    assert "<script" not in shown and "<b>" not in shown
    assert shown.count(html.escape(attack)) > 5


@pytest.mark.parametrize(
    "make",
    [tiny_swin, lambda: tiny_vit("vit_base_patch16_siglip_224"), tiny_vit],
    ids=["swin", "map pooling", "tokens"],
)
def test_submodules_of_every_kind(make, tmp_path):
    """A search of each family ends with its report."""
    supernet = ofb.Supernet(make(), "70%", epochs=1, steps_per_epoch=2, space=ofb.SearchSpace(tokens=make is tiny_vit))
    history, losses = History(supernet), {"loss": 1.0, "classification": 1.0, "val_loss": 1.0}
    with Journal(ofb.SearchConfig(output=str(tmp_path), epochs=1), "search") as journal:
        journal.record_history(-1, history)
        journal.record(0, losses | {"val_top1": 50.0, "val_top5": 90.0})
        journal.record_history(0, history)
    text = write_report(tmp_path).read_text()
    assert all(f"{name}: " in text for name in supernet.bimasks)
    assert len(re.findall('<tr><th scope="row">(?:embed|attn|mlp|pool|tokens)', text)) >= len(supernet.bimasks)


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"ofb: run: expected a run folder with config.yaml or metrics.jsonl, got {tmp_path}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metrics.jsonl",
            b'{"stage": "search"\n',
            "metrics.jsonl is damaged: line 1: Expecting ',' delimiter; remove this",
        ),
        (
            "metrics.jsonl",
            b'\n{"epoch": 1}\n',
            "metrics.jsonl is damaged: line 2: expected the entry of a stage's epoch",
        ),
        (
            "metrics.jsonl",
            b"7\n",
            "metrics.jsonl is damaged: line 1: expected the entry of a stage's epoch; remove this",
        ),
        ("metrics.jsonl", b"\xff\xfe", "metrics.jsonl is damaged: 'utf-8' codec can't decode .*; remove it"),
        ("metrics.jsonl", b"\0\0\0", "metrics.jsonl is damaged: line 1: Expecting value; remove this line"),
        ("history.jsonl", b'{"stage": "search", "epoch": 1}\n', "holds files that this package did not write"),
        (
            "history.jsonl",
            b'{"stage": "search", "epoch": []}\n',
            "history.jsonl is damaged: line 1: expected the entry",
        ),
        ("found.json", b"[]", "found.json is damaged: expected a dict, got list; mend or remove it"),
        ("importance.json", b"{", "importance.json is damaged: .*; mend or remove it"),
        ("figures.json", b'{"dense": 7}', "holds files that this package did not write"),
        ("config.yaml", b"a: [1", "config.yaml is damaged: .*; mend or remove it"),
    ],
)
def test_a_damaged_run(runs, tmp_path, capsys, name, content, message):
    run = copied(runs / "search", tmp_path / "run")
    (run / name).write_bytes(content)
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert re.match(f"ofb: run: {run}[/ ]{message}", error) and error.count("\n") == 1
    assert not (run / "report").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "history.jsonl"])
def test_a_last_line_that_breaks_off_is_left_out(runs, tmp_path, name):
    cut, without = (
        copied(runs / "search", tmp_path / "cut" / "run"),
        copied(runs / "search", tmp_path / "without" / "run"),
    )
    lines = (cut / name).read_text().splitlines(keepends=True)
    (cut / name).write_text("".join(lines)[:-10])
    (without / name).write_text("".join(lines[:-1]))
    assert page_of(cut) == page_of(without) != page_of(runs / "search")
