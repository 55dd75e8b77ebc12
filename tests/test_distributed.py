"""Several processes: they find what a single one finds, notice when they disagree, and carry on after a failure."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from ofb.cli import main
from ofb.engine.checkpoint import TEMPORARY, load_checkpoint
from ofb.engine.distributed import check_alike, check_device, in_job, on_main, process_group, processes, rank
from tests.common import determined
from tests.jobs import RUN, found_by_search, loaders, what_a_process_finds

ROOT = Path(__file__).parent.parent
TORCHRUN = {  # the environment of a single process that may be started anew
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "TORCHELASTIC_RUN_ID": "test",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "False",
}


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict:
    return found_by_search(str(tmp_path_factory.mktemp("single")))


@pytest.fixture(scope="module", params=[2, 4])
def job(request, tmp_path_factory) -> list[dict]:
    """What each process of a job found."""
    folder = tmp_path_factory.mktemp(f"job{request.param}")
    multiprocessing.set_forkserver_preload(["tests.jobs"])  # imports once what all processes need
    torch.multiprocessing.start_processes(
        what_a_process_finds, (request.param, str(folder)), request.param, start_method="forkserver"
    )
    found = [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(request.param)]
    found[0]["folder"] = folder / "run"
    return found


def test_processes_find_what_a_single_one_finds(single, job):
    for found in job:
        assert found["sizes"] == single["sizes"]
        assert found["weights"].keys() == single["weights"].keys()
        for name, weight in found["weights"].items():
            assert torch.equal(weight, job[0]["weights"][name]), name
        expected = determined(single["weights"])
        for name, weight in determined(found["weights"]).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)
        assert found["metrics"] == job[0]["metrics"]
        correct = found["metrics"]["top1"] * 64 / 100  # of 64 images, each once
        assert found["metrics"]["top5"] == pytest.approx(100) and correct == pytest.approx(round(correct), abs=1e-4)
        assert found["metrics"]["loss"] == pytest.approx(single["metrics"]["loss"], rel=1e-4)


def test_files_are_written_once(job):
    first, *others = (found["files"] for found in job)
    assert others == [[]] * len(others)
    checkpoints = Counter(name.split("-")[0] for name in first if name.endswith(".safetensors"))
    assert checkpoints == {"search": 5, "finetune": 3}  # one at the start of each
    assert first.count("metrics.jsonl") == 6 and first.count("importance.json") == 1
    entries = [json.loads(line) for line in (job[0]["folder"] / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["epoch"]) for entry in entries] == [
        *(("search", epoch) for epoch in range(4)),
        *(("finetune", epoch) for epoch in range(2)),
    ]
    assert len(list((job[0]["folder"] / "tensorboard" / "search").iterdir())) == 1


def test_a_changed_logit_is_noticed_everywhere(job):
    for found in job:
        assert found["tampered"].startswith(
            f"processes disagree after the pruning event of step 2: expected the same mlp1 everywhere, got others in "
            f"process {len(job) - 1} than in process 0"
        )


def test_a_tensor_of_another_shape_is_noticed_everywhere(job):
    for found in job:
        expected = f"processes disagree here: expected the same turned everywhere, got others in process {len(job) - 1}"
        assert found["other shape"].startswith(expected)


def test_means_are_over_all_processes(job):
    mean = sum(range(len(job))) / len(job)
    for found in job:
        assert found["means"]["values"].tolist() == [mean, 10 * mean]
        assert found["means"]["gradient"].tolist() == [[mean, 10 * mean]]


def test_shares_are_disjoint_and_complete(job):
    for name, images in {"loader": 21, "iterable": 7, "twice": 7}.items():
        batches = [share for found in job for share in found["shares"][name]]
        assert sorted(image for share in batches for image in share) == list(range(images))
    assert [found["shares"]["loader"][0] for found in job] != [[0]] * len(job)  # shuffled
    assert max(len(share) for found in job for share in found["shares"]["loader"]) == 4 // len(job)
    assert [found["shares"]["iterable"] for found in job[:2]] == [
        [list(range(0, 6, len(job))), [6]],
        [list(range(1, 6, len(job)))],
    ]
    for found in job:
        expected = len(job) ** 2
        assert found["uneven"].startswith(f"batch_size: expected a multiple of {expected} ({len(job)} processes × ")


def test_errors_and_results_of_the_first_process_are_everyones(job):
    for found in job:
        assert found["on main"][0] == 0
        assert "invalid literal for int()" in found["on main"][1]


def test_killed_job_carries_on(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "tests.jobs", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert job.returncode == 0, job.stderr
    assert "Signal 9 (SIGKILL)" in job.stderr or "exitcode: -9" in job.stderr
    assert job.stdout.count("search 1/3") == 2 and job.stdout.count("search 3/3") == 2  # one process speaks
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for file in ("metrics.jsonl", "importance.json", "export/model.safetensors", "export/config.json"):
        assert (killed / file).read_bytes() == (straight / file).read_bytes(), file
    assert load_checkpoint(killed / "checkpoints", "search")["epoch"] == 3
    names = {path.name for path in killed.rglob("*")}
    assert not [name for name in names if name.endswith(TEMPORARY)], "nothing half written is left"


@pytest.fixture
def by_torchrun(monkeypatch):
    """As if torchrun had started this process, alone."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    yield monkeypatch
    if in_job():
        torch.distributed.destroy_process_group()


def test_a_job_of_one_process_finds_the_same(by_torchrun, single, tmp_path):
    with process_group():
        assert in_job() and processes() == 1
        found = found_by_search(str(tmp_path))
    assert not in_job()
    assert found["sizes"] == single["sizes"] and found["metrics"] == single["metrics"]
    assert all(torch.equal(weight, single["weights"][name]) for name, weight in found["weights"].items())


def test_processes_do_not_share_a_gpu(by_torchrun):
    with process_group():
        check_device(torch.device("cuda:0"))
        by_torchrun.setenv("LOCAL_WORLD_SIZE", "2")
        check_device(torch.device("cpu"))
        with pytest.raises(ValueError, match="device: expected a GPU for each of the 2 processes, got 1"):
            check_device(torch.device("cuda:0"))


def test_a_restart_on_several_machines_needs_a_fresh_meeting_place(by_torchrun, capsys):
    by_torchrun.setenv("GROUP_WORLD_SIZE", "2")
    by_torchrun.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert main(RUN.split()) == 2
    assert "torchrun: expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err


def test_a_job_that_may_restart_needs_a_folder(by_torchrun, tmp_path, capsys):
    by_torchrun.chdir(tmp_path)
    assert main(RUN.split()) == 2
    assert "output: expected a folder where a job that restarts finds its run again" in capsys.readouterr().err


def test_without_a_job_nothing_is_exchanged():
    with process_group():
        assert not in_job() and rank() == 0 and on_main(max, 1, 2) == 2
    check_alike({"anything": [torch.zeros(2)]}, "ever")
    assert len(loaders()[0]) == 4
