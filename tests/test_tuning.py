"""Choice of a kernel's configuration: default, measured, tuned; and every candidate computes the same."""

import json
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from ofb_kernels import masked_attention, masked_linear, masked_mlp
from ofb_kernels.kernels import tuning
from ofb_kernels.testing import check_op

SMALL, LARGE = {"BLOCK_M": 16, "num_warps": 4}, {"BLOCK_M": 128, "num_warps": 8}
CANDIDATES = (SMALL, LARGE)
TIMES = {16: 2.0, 128: 1.0}
ON_GPU = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(tuning, "capability_of", lambda index: "9.0")
    monkeypatch.setattr(tuning, "shared_memory_of", lambda index: 99 * 1024)
    monkeypatch.setattr(tuning, "_FITTING", {})


def choose(sizes=(1000, 64)):
    return tuning.choose("kernel", CANDIDATES, sizes, ON_GPU, launch=None)


def test_default_comes_first(gpu):
    assert choose() == SMALL


def test_measured_configuration(gpu, monkeypatch):
    entries = [[[1000, 64], LARGE], [[10, 64], SMALL]]
    monkeypatch.setattr(tuning, "TABLE", {"9.0": {"configurations": {"kernel": entries}}})
    assert choose((800, 64)) == LARGE
    assert choose((11, 64)) == SMALL


def test_a_measured_configuration_that_is_no_candidate_any_more(gpu, monkeypatch):
    entries = [[[1000, 64], {"BLOCK_M": 999, "num_warps": 4}]]
    monkeypatch.setattr(tuning, "TABLE", {"9.0": {"configurations": {"kernel": entries}}})
    assert choose() == SMALL


def test_autotune_times_each_candidate_once(gpu, monkeypatch, tmp_path):
    timed = []

    def time(launch, configuration):
        timed.append(configuration)
        return TIMES[configuration["BLOCK_M"]]

    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "_milliseconds", time)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose((1000, 64)) == LARGE and timed == [SMALL, LARGE]
    assert choose((600, 64)) == LARGE and len(timed) == 2  # 513 to 1,024 rows count as 1,024
    assert choose((2000, 64)) == LARGE and len(timed) == 4
    tuning._read.cache_clear()  # as a new process
    assert choose((1000, 64)) == LARGE and len(timed) == 4
    assert json.loads(tuning.tuned_path().read_text()) == {
        "9.0": {"kernel": [[[1024, 64], LARGE], [[2048, 64], LARGE]]}
    }


def test_no_tuning_inside_a_graph_capture(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == SMALL


def shared(configuration):
    """Bytes of shared memory: a KiB for each row of the tile, so that LARGE is larger than 99 KiB."""
    return 1024 * configuration["BLOCK_M"]


def run(launch, candidates, sizes=(1000, 64)):
    return tuning.run_configured("kernel", candidates, sizes, ON_GPU, launch, shared)


def test_what_the_shared_memory_cannot_hold_is_left_out(gpu, monkeypatch):
    entries = [[[1000, 64], LARGE]]
    monkeypatch.setattr(tuning, "TABLE", {"9.0": {"configurations": {"kernel": entries}}})
    assert run(lambda configuration: configuration, (LARGE, SMALL)) == SMALL
    assert run(lambda configuration: configuration, (SMALL, LARGE), (1000, 8)) == SMALL
    monkeypatch.setattr(tuning, "shared_memory_of", lambda index: 227 * 1024)
    assert run(lambda configuration: configuration, (SMALL, LARGE), (1000, 65)) == LARGE


def test_the_least_demanding_is_launched_where_none_should_fit(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "shared_memory_of", lambda index: 1024)
    assert run(lambda configuration: configuration, (LARGE, SMALL)) == SMALL


def test_a_configuration_that_the_gpu_refuses_is_tried_once(gpu, monkeypatch, caplog):
    monkeypatch.setattr(tuning, "shared_memory_of", lambda index: 227 * 1024)
    launched = []

    def launch(configuration):
        launched.append(configuration)
        if configuration == LARGE:
            raise OutOfResources(131_072, 101_376, "shared memory")
        return configuration

    assert run(launch, (LARGE, SMALL)) == SMALL and launched == [LARGE, SMALL]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "kernel: leaves out" in caplog.text and "Required: 131072, Hardware limit: 101376" in caplog.text
    assert run(launch, (LARGE, SMALL), (2000, 64)) == SMALL and launched == [LARGE, SMALL, SMALL]
    assert run(launch, (LARGE, SMALL), (1000, 65)) == SMALL and launched[3:] == [LARGE, SMALL]
    with pytest.raises(OutOfResources, match="shared memory"):
        run(launch, (LARGE,), (1000, 66))


def test_autotune_passes_over_what_the_gpu_refuses(gpu, monkeypatch, tmp_path):
    def launch(configuration):
        if configuration == LARGE:
            raise OutOfResources(128, 64, "threads")
        return configuration

    def bench(function, return_mode):
        return TIMES[function()["BLOCK_M"]]

    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(triton.testing, "do_bench", bench)
    monkeypatch.setattr(tuning, "shared_memory_of", lambda index: 227 * 1024)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert run(launch, (LARGE, SMALL)) == SMALL


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"9.0": 1}'])
def test_damaged_file_counts_as_empty(content, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(content)
    found = tuning.tuned("kernel", CANDIDATES, (10,), "9.0", lambda c: TIMES[c["BLOCK_M"]], path)
    assert found == LARGE
    assert json.loads(path.read_text()) == {"9.0": {"kernel": [[[16], LARGE]]}}


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "tuned.json"
    assert tuning.tuned("kernel", CANDIDATES, (10,), "9.0", lambda c: TIMES[c["BLOCK_M"]], path) == LARGE


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_candidate_computes_the_same(index, dtype, device, monkeypatch):
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter computes garbage in bfloat16")

    def choose(kernel, candidates, *_):
        chosen.add((kernel, index % len(candidates)))
        return candidates[index % len(candidates)]

    chosen = set()
    monkeypatch.setattr(tuning, "choose", choose)

    def random(*shape):
        return torch.randn(shape, device=device).to(dtype)

    mask = random(72).sigmoid()
    linear = {"x": random(150, 40), "weight": random(72, 40) / 6, "bias": random(72), "mask": mask}
    check_op(masked_linear, linear, {"activation": "gelu"}, "triton", reduction=150)
    mlp = {"x": random(150, 40), "fc1_weight": random(72, 40) / 6, "fc1_bias": random(72), "mask": mask}
    mlp |= {"fc2_weight": random(40, 72) / 8, "fc2_bias": random(40)}
    check_op(masked_mlp, mlp, {}, "triton", reduction=150)
    for head_dim in (24, 72):
        for tokens in (40, 270):
            attention = {"qkv": random(1, tokens, 3, 2, head_dim), "mask": random(2, head_dim).sigmoid()}
            check_op(masked_attention, attention, {}, "triton", reduction=2 * tokens)
    assert len(chosen) == 9  # linear and MLP backward, linear forward, three of attention at two widths
