"""`specontext plan`: Algorithm 1 from the command line, for presets and checkpoints, and errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import pytest

from specontext.cli.options import parse_bandwidth, parse_size
from specontext.cli.terminal import UsageError

Fails = Callable[..., str]
GIB = 1 << 30
LLAMA = ["llama-3.1-8b", "--gpu-memory", "24GiB"]
RATES = ["--bandwidth", "1TB/s", "--host-bandwidth", "25GB/s"]
PARTS = {"weights", "retrieval_head", "runtime", "kv_device", "kv_host"}


def algorithm_1(memory: int, parameters: int, requests: int, budget: int, sizes: tuple[int, int, int, int]) -> list[int]:
    layers, query, heads, dim = sizes
    room, alpha = memory - Fraction(13, 10) * 2 * parameters, query // heads
    entry = 4 * requests * heads * dim
    return [max(-1, floor((room - i * budget * entry) / (entry * (layers + 1 + alpha - i)))) for i in range(layers + 1)]


@pytest.mark.parametrize(
    ("name", "memory", "requests", "parameters", "sizes"),
    [
        ("llama-3.1-8b", 80, 32, 8_030_261_248 + 92_282_880, (32, 32, 8, 128)),
        ("qwen3-8b", 80, 16, 8_190_735_360 + 92_282_880, (36, 32, 8, 128)),
        ("llama-3.2-1b", 4, 1, 1_235_814_400 + 23_072_768, (16, 32, 8, 64)),
    ],
)
def test_paper_is_algorithm_1(run: Any, name: str, memory: int, requests: int, parameters: int, sizes: Any) -> None:
    words = ["plan", name, "--gpu-memory", f"{memory}GiB", "--requests", requests, "--budget", 2048, "--mode", "paper", "--json"]
    found = run(*words).json
    expected = algorithm_1(memory * GIB, parameters, requests, 2048, sizes)
    assert found["thresholds"] == expected
    assert found["max_len_resident"] == expected[0]
    assert found["max_len_offloaded"] == max(expected)
    assert set(found["bytes"]) == PARTS
    assert found["bytes"]["weights"] + found["bytes"]["retrieval_head"] == 2 * parameters
    assert sum(found["bytes"].values()) - found["host_bytes"] == found["device_bytes"] <= memory * GIB
    assert found["host_bytes"] == found["bytes"]["kv_host"]


def test_kv_in_8_bits_of_both_tiers_and_of_the_host_alone(run: Any) -> None:
    words = ["plan", *LLAMA, "--max-model-len", 65536, "--json"]
    plain, both, host = (run(*words, *more).json for more in ([], ["--kv-cache-dtype", "fp8"], ["--host-kv-dtype", "fp8"]))
    assert [one["inputs"]["host_kv_dtype"] for one in (plain, both, host)] == ["auto", "auto", "fp8"]
    # On the host a row has 260 bytes, in blocks of 8 layers instead of 4.
    assert host["inputs"]["kv_bytes_per_token"] == plain["inputs"]["kv_bytes_per_token"] > both["inputs"]["kv_bytes_per_token"]
    layers = -(-host["bytes_at"]["offloaded_layers"] // 8) * 8
    assert host["host_bytes"] == (65536 * layers + 16 * 8) * 8 * 260
    said = run("plan", *LLAMA, "--host-kv-dtype", "int8").stdout
    assert "128 KiB of KV a token, 65.0 KiB on the host as int8 with scales" in said
    wrong = run("plan", *LLAMA, "--host-kv-dtype", "int8", "--kv-cache-dtype", "fp8")
    assert wrong.status and "two kinds of 8 bits: leave one out" in wrong.stderr


def test_measured_is_the_default_and_names_more_parts(run: Any) -> None:
    found = run("plan", *LLAMA, "--requests", 4, "--json").json
    assert found["mode"] == "measured" and len(found["thresholds"]) == 33
    assert set(found["bytes"]) == PARTS | {"graphs", "tables", "workspace", "keys", "slots"}
    assert found["bytes"]["weights"] == 16_060_522_496
    assert found["inputs"]["budget"] == found["inputs"]["slots"] == 2048
    assert found["max_len"] == found["inputs"]["max_model_len"] == 131072 and found["limited_by"] == "model"
    assert sum(found["bytes"].values()) - found["host_bytes"] <= 24 * GIB
    more = run("plan", *LLAMA, "--requests", 4, "--slots", 4096, "--runtime", "6GiB", "--graphs", "256MiB", "--json").json
    assert more["bytes"]["runtime"] == 6 * GIB and more["bytes"]["graphs"] == GIB // 4
    assert more["thresholds"][0] < found["thresholds"][0]
    shorter = run("plan", *LLAMA, "--requests", 4, "--max-model-len", 8192, "--json").json
    assert shorter["max_len"] == 8192 and shorter["bytes"]["tables"] < found["bytes"]["tables"]


def test_lengths_show_fewer_and_fewer_layers_on_the_gpu_and_the_expected_step(run: Any) -> None:
    found = run("plan", *LLAMA, "--requests", 4, *RATES, "--json").json
    rows = found["lengths"]
    assert rows[-1]["length"] == 131072 and all(row["fits"] for row in rows)
    layers = [row["resident_layers"] for row in rows]
    assert layers == sorted(layers, reverse=True) and layers[0] == 32 > layers[-1]
    last = rows[-1]
    assert last["device_bytes"] <= 24 * GIB
    selected = 4 * 2048 * 8 * 512
    read = 2 * (8_030_261_248 - 128256 * 4096 + 92_282_880) + 4 * 131072 * 2048 + 32 * selected
    loaded = round(0.15 * selected * last["offloaded_layers"])
    assert last["step_s"] == pytest.approx(max((read + loaded) / 1e12, loaded / 25e9))
    assert last["tokens_per_s"] == pytest.approx(4 / last["step_s"])
    slow = run("plan", *LLAMA, "--requests", 4, "--bandwidth", "1TB/s", "--host-bandwidth", "1GB/s", "--json").json
    assert slow["lengths"][-1]["step_limited_by"] == "host_bandwidth"


def test_host_memory_limits(run: Any) -> None:
    found = run("plan", *LLAMA, "--requests", 4, "--host-memory", "16GiB", "--json").json
    assert found["limited_by"] == "host_memory" and found["host_bytes"] <= 16 * GIB
    assert found["max_len_resident"] < found["max_len_offloaded"] == found["max_len"] < found["max_len_device"]
    shown = run("plan", *LLAMA, "--requests", 4, "--host-memory", "16GiB").stdout
    assert "too much for the host" in shown and f"{found['max_len']:,}" in shown


def test_the_choice_has_the_most_tokens_a_second(run: Any) -> None:
    words = ["plan", "llama-3.1-8b", "--gpu-memory", "80GiB", "--host-memory", "100GiB", "--max-model-len", 32768, "--json"]
    found = run(*words).json
    choice, curve = found["choice"], found["curve"]
    assert {"requests", "offloaded_layers", "tokens_per_s"} <= set(choice) and choice in curve
    assert choice["tokens_per_s"] == max(one["tokens_per_s"] for one in curve) > 2 * curve[0]["tokens_per_s"]
    assert choice["requests"] < curve[-1]["requests"] and {one["length"] for one in curve} == {32768}
    assert [one["length"] for one in found["choices"]] == [row["length"] for row in found["lengths"]]
    assert found["machine"]["name"] == found["inputs"]["bandwidths_of"] == "NVIDIA H100"
    for row in found["lengths"]:
        assert row["step_s"] > 0 and row["step_limited_by"] in ("bandwidth", "host_bandwidth"), "floors at the same bandwidths"
    more = run(*words, "--min-num-seqs", 32).json["choice"]
    assert more["requests"] >= 32 and more["tokens_per_s"] < choice["tokens_per_s"]
    assert run(*words, "--max-num-seqs", 8).json["choice"]["requests"] == 8
    assert run(*words, "--max-tpot-ms", 8).json["choice"]["step_s"] <= 0.008
    assert found["limits_not_kept"] == []
    slow = run(*words, "--bandwidth", "3TB/s", "--host-bandwidth", "1GB/s").json["choice"]
    assert slow["offloaded_layers"] == 0 and slow["requests"] < choice["requests"]
    nothing = run("plan", "llama-3.1-8b", "--gpu-memory", "15.2GiB", "--json").json
    assert nothing["choice"] is None and nothing["curve"] == []
    assert "choice" in run("plan", *LLAMA).stdout


def test_limits_that_cannot_be_kept_are_named(run: Any) -> None:
    words = ["plan", "llama-3.1-8b", "--gpu-memory", "80GiB", "--host-memory", "100GiB", "--max-model-len", 32768]
    quick, many = ["--max-tpot-ms", 0.5], ["--min-num-seqs", 60]
    found = run(*words, *quick, "--json").json
    assert found["choice"]["requests"] == 1 and found["limits_not_kept"] == ["max_tpot_ms"]
    found = run(*words, *many, "--json").json
    assert found["choice"]["requests"] == len(found["curve"]) < 60 and found["limits_not_kept"] == ["min_num_seqs"]
    assert run(*words, *many, *quick, "--json").json["limits_not_kept"] == ["min_num_seqs", "max_tpot_ms"]
    said = run(*words, *many, "--max-tpot-ms", 1000).stdout
    assert "--min-num-seqs 60 cannot be kept at 32,768 tokens" in said and "--max-tpot-ms" not in said


@pytest.fixture(autouse=True)
def no_measured_machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECONTEXT_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_for_people(run: Any) -> None:
    ran = run("plan", *LLAMA, "--requests", 4, *RATES)
    assert ran.status == 0 and ran.stderr == ""
    for words in ("8.03 B parameters", "Longest context", "What fits where", "Thresholds", "floors", "1 TB/s", "25 GB/s"):
        assert words in ran.stdout
    assert max(map(len, ran.stdout.splitlines()[4:-4])) <= 110
    assert "--bandwidth" in run("plan", *LLAMA).stdout
    assert "Nothing fits" in run("plan", "llama-3.1-8b", "--gpu-memory", "15.2GiB").stdout


def test_nothing_fits_beside_the_weights(run: Any) -> None:
    found = run("plan", "llama-3.1-8b", "--gpu-memory", "15.2GiB", "--mode", "paper", "--json").json
    assert set(found["thresholds"]) == {-1}
    assert found["max_len_resident"] == found["max_len_offloaded"] == found["host_bytes"] == 0


def test_nano_and_its_own_head(run: Any) -> None:
    found = run("plan", "nano", "--gpu-memory", "300MiB", "--requests", 2, "--json").json
    assert found["inputs"]["budget"] == 256 and found["inputs"]["dtype"] == "float32"
    assert found["inputs"]["retrieval_head"] == "the model's own"
    assert found["bytes"]["weights"] == 4 * found["inputs"]["model_parameters"]
    assert 900_000 < found["inputs"]["model_parameters"] < 1_100_000


def test_a_directory_needs_no_more_than_a_config(run: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    words = ["--gpu-memory", "300MiB", "--budget", 64, "--json"]
    bare, whole = run("plan", tmp_path, *words).json, run("plan", tiny, *words).json
    assert bare["inputs"]["model_parameters"] == whole["inputs"]["model_parameters"]
    assert bare["inputs"]["retrieval_head"].startswith("size of a head pruned")
    assert bare["inputs"]["retrieval_head_parameters"] == 2 * 64 * (4 + 2) * 24 + 2 * 64 + 3 * 64 * 64
    named = run("plan", tmp_path, *words, "--retrieval-head", tiny / "retrieval_head").json
    assert named["inputs"]["retrieval_head_parameters"] == whole["inputs"]["retrieval_head_parameters"]


def test_presets_are_listed(run: Any) -> None:
    shown = run("plan", "--list-presets")
    assert shown.status == 0
    names = json.loads(run("plan", "--list-presets", "--json").stdout)
    assert {"llama-3.1-8b", "r1-distill-llama-8b", "qwen3-8b", "qwen3-0.6b", "llama-3.2-1b"} <= set(names)
    assert all(name in shown.stdout for name in names)


@pytest.mark.parametrize("options", [["--mode", "paper"], ["--host-memory", "16GiB"], ["--max-model-len", "4096"]])
def test_plot(run: Any, tmp_path: Path, options: list[str]) -> None:
    pytest.importorskip("matplotlib")
    ran = run("plan", *LLAMA, "--requests", 4, *options, "--plot", tmp_path / "plan.png")
    assert ran.status == 0 and ran.stdout.splitlines()[-1] == str(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_nothing(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("plan", "llama-3.1-8b", "--gpu-memory", "15.2GiB", "--json", "--plot", tmp_path / "plan.png").status == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--list-presets"),
        (["llama-3.1-8b"], "--gpu-memory 24GiB"),
        ([*LLAMA, "--requests", "0"], "--requests"),
        ([*LLAMA, "--requests", "99999999"], "--requests"),
        ([*LLAMA, "--budget", "0"], "budget"),
        ([*LLAMA, "--budget", "4096", "--max-model-len", "2048"], "exceeds the longest context of 2048 tokens"),
        ([*LLAMA, "--budget", "200000"], "lower --budget"),
        ([*LLAMA, "--budget", "2048", "--slots", "64"], "slots"),
        ([*LLAMA, "--max-model-len", "0"], "--max-model-len"),
        ([*LLAMA, "--max-model-len", "200000"], "131072"),
        ([*LLAMA, "--mode", "guess"], "measured, paper"),
        ([*LLAMA, "--mode", "paper", "--slots", "4096"], "--slots has no meaning"),
        ([*LLAMA, "--mode", "paper", "--dtype", "float32"], "--mode measured"),
        ([*LLAMA, "--dtype", "int4"], "bfloat16"),
        ([*LLAMA, "--host-memory", "0"], "at least one byte"),
        ([*LLAMA, "--host-memory", "64Gb/s"], "64GiB"),
        ([*LLAMA, "--bandwidth", "1TB/s"], "--host-bandwidth"),
        ([*LLAMA, "--bandwidth", "fast", "--host-bandwidth", "25GB/s"], "3.3TB/s"),
        ([*LLAMA, "--overlap", "1.5"], "--overlap"),
        ([*LLAMA, "--max-num-seqs", "0"], "--max-num-seqs"),
        ([*LLAMA, "--min-num-seqs", "9", "--max-num-seqs", "8"], "--min-num-seqs"),
        ([*LLAMA, "--max-tpot-ms", "0"], "--max-tpot-ms"),
        ([*LLAMA, "--plot", "plan.gif"], ".png"),
        ([*LLAMA, "--plot", "/no/such/folder/plan.png"], "/no/such/folder"),
        ([*LLAMA, "--retrieval-head", "nano"], "another model"),
        (["llama-3.1-8b", "--gpu-memory", "24"], "24GiB"),
        (["llama-3.1-8b", "--gpu-memory", "24G"], "write 24GiB"),
        (["llama-3.1-8b", "--gpu-memory", "24TiBB"], "write 24TiB"),
        (["llama-3.1-8b", "--gpu-memory", "99999TiB"], "check the unit"),
        (["llama-3.1-8b", "--gpu-memory", "-1GiB"], "24GiB"),
    ],
)
def test_bad_options(fails: Fails, words: list[str], says: str) -> None:
    assert says in fails(["plan", *words])


def test_what_limits_the_context_is_said(run: Any, tiny: Path, tmp_path: Path) -> None:
    values = json.loads((tiny / "config.json").read_text()) | {"sliding_window": 128}
    (tmp_path / "config.json").write_text(json.dumps(values))
    said = run("plan", tmp_path, "--gpu-memory", "1GiB", "--budget", 64).stdout
    assert "contexts of up to 128 tokens (sliding_window 128 in its config" in said


def test_where_all_layers_have_a_window_nothing_grows(run: Any, tiny: Path, tmp_path: Path) -> None:
    values = json.loads((tiny / "config.json").read_text()) | {"sliding_window": 128}
    values |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    said = run("plan", tmp_path, "--gpu-memory", "1GiB", "--budget", 64).stdout
    assert "layers, all with a window" in said and "nothing grows with it" in said and "none: nothing is selected" in said
    found = json.loads(run("plan", tmp_path, "--gpu-memory", "1GiB", "--budget", 64, "--json").stdout)
    assert found["inputs"]["layers"] == 0 and found["inputs"]["kv_bytes_per_token"] == 0


def test_models_that_cannot_be_planned(fails: Fails, tmp_path: Path) -> None:
    memory = ["--gpu-memory", "24GiB"]
    assert "did you mean llama-3.1-8b" in fails(["plan", "lama-3.1-8b", *memory], status=1)
    assert "no such preset" in fails(["plan", "zzz", *memory], status=1)
    assert "config.json" in fails(["plan", tmp_path, *memory], status=1)
    config = tmp_path / "config.json"
    config.write_text("{")
    assert "cannot read the config" in fails(["plan", tmp_path, *memory], status=1)
    config.write_text(json.dumps({"model_type": "mamba"}))
    assert "none of its layers has attention" in fails(["plan", tmp_path, *memory], status=1)
    config.write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 0}))
    assert "num_key_value_heads is 0" in fails(["plan", tmp_path, *memory], status=1)


@pytest.mark.parametrize("mode", ["paper", "measured"])
def test_a_gpu_that_is_too_small_for_the_weights(fails: Fails, mode: str) -> None:
    message = fails(["plan", "llama-3.3-70b", "--gpu-memory", "80GiB", "--mode", mode], status=1)
    assert "131.42 GiB" in message and "80.00 GiB" in message and "52.07 GiB too little" in message


def test_bandwidths() -> None:
    assert parse_bandwidth("3.3TB/s") == 3_300_000_000_000
    assert parse_bandwidth(" 1 GiB / s") == GIB
    for text in ("3.3TB", "50", "50/s/s", "/s", "fast/s", "3TB/h", "0GB/s"):
        with pytest.raises(UsageError, match="bandwidth"):
            parse_bandwidth(text)


@pytest.mark.parametrize(("text", "meant"), [("24G", "24GiB"), ("1.5gigs", "1.5GiB"), ("4096 MiBs", "4096MiB")])
def test_a_misspelt_unit_is_guessed(text: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"write {meant}$"):
        parse_size(text)


@pytest.mark.parametrize(("kind", "bits"), [("fp8", 8.0), ("int4", 4.2)])
def test_rounded_weights_of_a_preset(run: Any, kind: str, bits: float) -> None:
    plain, found = (run("plan", *LLAMA, *more, "--json").json for more in ([], ["--quantization", kind]))
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    saved = plain["bytes"]["weights"] - found["bytes"]["weights"]
    assert saved / layers == pytest.approx(2 - bits / 8, abs=0.01)
    assert found["weights"] == f"rounded to {kind}" and found["max_len_resident"] > plain["max_len_resident"]
    fast, slow = (run("plan", *LLAMA, *more, *RATES, "--json").json["lengths"][0] for more in (["--quantization", kind], []))
    assert slow["step_s"] - fast["step_s"] == pytest.approx(saved / 1e12)


def test_a_card_of_8_gb_takes_qwen3_8b_with_4_bits(run: Any, fails: Fails) -> None:
    words = "plan qwen3-8b --gpu-memory 8GiB --host-memory 32GiB --max-model-len 65536 --json".split()
    assert "weights" in fails(words, status=1)
    found = run(*words, "--quantization", "int4").json
    assert found["max_len"] == found["inputs"]["max_model_len"] == 65536
    last = found["lengths"][-1]
    assert last["fits"] and last["device_bytes"] <= 8 * GIB and 0 < last["resident_layers"] < 36
    said = run(*words[:-1], "--quantization", "int4").stdout
    assert "beyond 40,960 with YaRN" in said and "rounded to int4" in said
    assert "exceeds the model's maximum of 40960" in fails([*words[:-2], 131073, "--quantization", "int4"])


def test_quantization_that_is_not_known(fails: Fails) -> None:
    assert "choose one of fp8, int4" in fails(["plan", *LLAMA, "--quantization", "awq"])
    assert "--quantization has no meaning in mode paper" in fails(["plan", *LLAMA, "--quantization", "fp8", "--mode", "paper"])


def test_ranks_share_a_model(run: Any, fails: Fails) -> None:
    whole, part = (run("plan", *LLAMA, "--tensor-parallel-size", size, "--json").json for size in (1, 4))
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert whole["bytes"]["weights"] - part["bytes"]["weights"] == 2 * (layers + 128256 * 4096) * 3 // 4
    assert part["inputs"]["kv_heads"] == 2 and part["inputs"]["kv_bytes_per_token"] * 4 == whole["inputs"]["kv_bytes_per_token"]
    assert part["max_len_resident"] > whole["max_len_resident"]
    rounded, quarter = (run("plan", *LLAMA, *more, "--quantization", "fp8", "--json").json for more in ((), ("-tp", 4)))
    saved = rounded["bytes"]["weights"] - quarter["bytes"]["weights"]
    assert saved == pytest.approx((layers + 2 * 128256 * 4096) * 3 / 4, rel=0.001)  # a byte each, two in the output layer
    assert "each of 4 ranks of" in run("plan", *LLAMA, "-tp", 4).stdout
    assert "tensor_parallel_size 3 does not fit" in fails(["plan", *LLAMA, "-tp", 3])
    assert "has no meaning in mode paper" in fails(["plan", *LLAMA, "-tp", 2, "--mode", "paper"])


def test_heads_are_asked_for_as_elsewhere(run: Any) -> None:
    plain, auto, none = (
        run("plan", *LLAMA, *more, "--json").json for more in ((), *(("--retrieval-head", it) for it in ("auto", "none")))
    )
    assert auto == plain and none["inputs"]["retrieval_head"].startswith("none")
    assert none["bytes"]["weights"] == plain["bytes"]["weights"] and none["max_len_resident"] > plain["max_len_resident"]
    nano = run("plan", "nano", "--retrieval-head", "none", "--gpu-memory", "1GiB", "--json").json
    assert not nano["inputs"]["retrieval_head_parameters"]
